"""Who is let in, and why others are not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pollard.services.common.auth import OPEN, Caller, Gate, GateRules, Limits, Role
from pollard.services.common.auth.errors import (
    AccessUnknown,
    CredentialEnded,
    CredentialInvalid,
    CredentialMissing,
    LimitReached,
    RoleMissing,
)
from pollard.services.common.auth.gate import behalf_of
from pollard.services.common.auth.jwts import JwtRules
from pollard.services.common.auth.tokens import make_token

PREDICT = "/pollard.vision.v1.VisionService/Predict"
SET_ALIAS = "/pollard.models.v1.ModelService/SetAlias"
INFER = "/inference.GRPCInferenceService/ModelInfer"
HEALTH = "/grpc.health.v1.Health/Check"


@pytest.fixture
def gate(tokens) -> Gate:
    return Gate(GateRules(tokens=True))


def test_a_token_is_its_holder(gate, tokens) -> None:
    token = tokens.make(Role.PREDICTOR, "camera")
    gate.know(tokens.table)
    caller = gate.admit(PREDICT, f"Bearer {token}")
    assert (caller.name, caller.role, caller.kind) == ("camera", Role.PREDICTOR, "token")
    assert gate.admit(PREDICT, f"bearer {token}".encode()) == caller
    assert gate.caller_of_headers({"authorization": f"Bearer {token}"}) == caller
    assert token not in repr(caller) + caller.actor


def test_without_rules_everybody_may_do_everything() -> None:
    assert Gate().admit(SET_ALIAS) is OPEN
    assert Gate().caller_of_headers({}) is OPEN


def test_health_asks_for_nothing(gate) -> None:
    assert gate.admit(HEALTH) is OPEN
    assert gate.admit(HEALTH, "Bearer nonsense") is OPEN


def test_who_shows_nothing_is_told_how_to(gate) -> None:
    with pytest.raises(CredentialMissing, match="authorization: Bearer"):
        gate.admit(PREDICT)


@pytest.mark.parametrize(
    "shown",
    [
        "Bearer ",
        "Bearer x",
        "Basic dXNlcjpwYXNz",
        "twice",
        "Bearer plrd_short",
        "Bearer plrd_" + "a" * 10 + "_" + "a" * 51,
        "Bearer plrd_" + "A" * 10 + "_" + "a" * 52,
        "Bearer a.b.c",
        b"Bearer \xff\xfe",
        "Bearer " + "a" * 100_000,
    ],
)
def test_what_is_no_token_is_refused_without_being_quoted(gate, tokens, shown) -> None:
    gate.know(tokens.table)
    with pytest.raises(CredentialInvalid) as caught:
        gate.admit(PREDICT, shown)
    assert caught.value.reason == "TOKEN_MALFORMED"
    assert len(caught.value.message) < 200


def test_a_token_of_another_installation_is_not_known(gate, tokens) -> None:
    gate.know(tokens.table)
    foreign = make_token()
    with pytest.raises(CredentialInvalid) as caught:
        gate.admit(PREDICT, f"Bearer {foreign}")
    assert caught.value.reason == "TOKEN_UNKNOWN"
    assert foreign not in str(caught.value.metadata) + caught.value.message


def test_a_server_that_has_heard_nothing_yet_says_so(gate) -> None:
    with pytest.raises(AccessUnknown, match="try again"):
        gate.admit(PREDICT, f"Bearer {make_token()}")


def test_tokens_end(gate, tokens) -> None:
    expired = tokens.make(Role.ADMIN, expires=time.time() - 1)
    revoked = tokens.make(Role.ADMIN, revoked=True)
    lasting = tokens.make(Role.ADMIN, expires=time.time() + 600)
    gate.know(tokens.table)
    for token, reason in ((expired, "TOKEN_EXPIRED"), (revoked, "TOKEN_REVOKED")):
        with pytest.raises(CredentialEnded) as caught:
            gate.admit(PREDICT, f"Bearer {token}")
        assert caught.value.reason == reason
        assert token not in caught.value.message
    assert gate.admit(PREDICT, f"Bearer {lasting}").role is Role.ADMIN


def test_a_token_that_is_taken_away_ends_at_once(gate, tokens) -> None:
    token = tokens.make(Role.PREDICTOR)
    gate.know(tokens.table)
    gate.admit(PREDICT, f"Bearer {token}")
    tokens.known.clear()
    gate.know(tokens.table)
    with pytest.raises(CredentialInvalid):
        gate.admit(PREDICT, f"Bearer {token}")


def test_who_is_known_may_not_do_everything(gate, tokens) -> None:
    token = tokens.make(Role.PREDICTOR, "camera")
    gate.know(tokens.table)
    with pytest.raises(RoleMissing, match=r"camera has the role predictor.*needs publisher"):
        gate.admit(SET_ALIAS, f"Bearer {token}")
    with pytest.raises(RoleMissing, match="nobody"):
        gate.admit("/pollard.models.v1.ModelService/Unheard", f"Bearer {token}")


def test_a_service_is_believed_for_whom_it_calls(gate, tokens) -> None:
    limits = Limits(concurrent_requests=1)
    client = tokens.make(Role.PREDICTOR, "caméra 1", limits=limits)
    server = tokens.make(Role.SERVER, "preprocess")
    gate.know(tokens.table)
    real = gate.admit(PREDICT, f"Bearer {client}")
    seen = gate.admit(INFER, f"Bearer {server}", behalf_of(real))
    assert (seen.key, seen.name, seen.role) == (real.key, real.name, real.role)
    assert seen.limits == limits
    assert seen.server.startswith("token:")
    # The same caller, so the same counts.
    with gate.enter(INFER, real), pytest.raises(LimitReached):
        gate.enter(INFER, seen)


@pytest.mark.parametrize("behalf", ["", "nonsense", "root a b", "predictor a b c", "a " * 2000])
def test_nonsense_about_whom_a_service_calls_for_leaves_the_service(gate, tokens, behalf) -> None:
    server = tokens.make(Role.SERVER, "preprocess")
    gate.know(tokens.table)
    assert gate.admit(INFER, f"Bearer {server}", behalf).role is Role.SERVER


def test_nobody_else_is_believed(gate, tokens) -> None:
    client = tokens.make(Role.ADMIN, "mallory")
    gate.know(tokens.table)
    other = Caller("alice", Role.PREDICTOR, "token", "token:alice")
    assert gate.admit(INFER, f"Bearer {client}", behalf_of(other)).name == "mallory"


def test_names_in_certificates_have_roles(tokens) -> None:
    rules = GateRules(
        tokens=True,
        certificates=(("robot.example.org", Role.ADMIN), ("*.example.org", Role.VIEWER)),
    )
    gate = Gate(rules)
    gate.know(tokens.table)
    seen = gate.admit(SET_ALIAS, names=lambda: ["robot.example.org"])
    assert (seen.name, seen.kind) == ("robot.example.org", "certificate")
    with pytest.raises(RoleMissing):
        gate.admit(SET_ALIAS, names=lambda: ["other.example.org"])
    for name in ("example.org", "evilexample.org", "robot.example.org.evil"):
        with pytest.raises(CredentialMissing, match="certificate"):
            gate.admit(SET_ALIAS, names=lambda name=name: [name])
    # Whoever shows a token is judged by it alone.
    with pytest.raises(CredentialInvalid):
        gate.admit(SET_ALIAS, "Bearer nonsense", names=lambda: ["robot.example.org"])


def _in_the_end(ask: Callable[[], object]) -> CredentialEnded:
    """Ask until it is refused; return why."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        try:
            ask()
        except CredentialEnded as error:
            return error
        time.sleep(0.05)
    raise AssertionError("it is never refused")


def test_json_web_tokens_are_remembered_until_they_expire(make_issuer) -> None:
    issuer = make_issuer("login")
    gate = Gate(GateRules(jwt=JwtRules(str(issuer.file), "pollard")))
    lasting = issuer.sign()
    first = gate.admit(PREDICT, f"Bearer {lasting}")
    assert (first.name, first.kind, first.role) == ("alice", "jwt", Role.PREDICTOR)
    assert gate.admit(PREDICT, f"Bearer {lasting}") is first
    # Ends in a moment: clocks may differ by five seconds.
    ending = issuer.sign(exp=time.time() - 3)
    gate.admit(PREDICT, f"Bearer {ending}")
    assert _in_the_end(lambda: gate.admit(PREDICT, f"Bearer {ending}")).reason == "TOKEN_EXPIRED"


def test_refusals_are_told_once_and_then_counted(gate, tokens, capsys) -> None:
    gate.know(tokens.table)
    token = make_token()
    for _ in range(50):
        with pytest.raises(CredentialInvalid):
            gate.admit(PREDICT, f"Bearer {token}")
    told = [line for line in capsys.readouterr().out.splitlines() if "refused" in line]
    assert len(told) == 1
    assert "TOKEN_UNKNOWN" in told[0]
    assert token not in told[0]
