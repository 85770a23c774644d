"""The whole suite where only those get in who show a token."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from pollard.client import (
    ModelsClient,
    NewToken,
    PermissionDenied,
    PollardError,
    ResourceExhausted,
    RetryPolicy,
    TokenLimits,
    Unauthenticated,
    VisionClient,
)
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, make_up: Callable[..., Any]) -> Any:
    """One `pollard up --tokens` for all tests that leave it running."""
    return make_up(tmp_path_factory.mktemp("guarded"), "--tokens")


@pytest.fixture(scope="module")
def admin(guarded: Any) -> str:
    return (guarded.data_dir / "models" / "tokens" / "admin.token").read_text().strip()


@pytest.fixture
def models(guarded: Any, admin: str) -> Iterator[ModelsClient]:
    with ModelsClient(guarded.address("models"), token=admin) as client:
        yield client


@pytest.fixture
def served(models: ModelsClient, make_bundle: Any) -> ModelsClient:
    """The model "m" is in production."""
    if not models.models():
        publish(models, make_bundle(seed=1).path)
    return models


def publish(models: ModelsClient, path: Path) -> None:
    """Push a bundle as the model "m", and wait until it is in production."""
    models.push(path, "m", alias="production")


def vision(up: Any, token: str | None) -> VisionClient:
    return VisionClient(up.address("preprocess"), token=token, retry=RetryPolicy.none())


def infer(up: Any, token: str) -> str:
    """Ask the inference service itself; return the revision that answered."""
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[PIXELS.tobytes()])
    request.inputs.add(name="image", datatype="UINT8", shape=[1, 8, 8, 1])
    with grpc.insecure_channel(up.address("inference")) as channel:
        answer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
            request, timeout=20, metadata=(("authorization", f"Bearer {token}"),)
        )
    return str(answer.model_version)


def in_the_end(ask: Callable[[], object], kind: type[Exception]) -> Exception:
    """Ask until it is refused; return the refusal."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        try:
            ask()
        except kind as error:
            return error
        time.sleep(0.02)
    raise AssertionError("it is never refused")


def until_known(ask: Callable[[], Any]) -> Any:
    """Ask until the servers know the token, and the model: that takes as long as a message does."""
    give_up = time.monotonic() + 30
    while True:
        try:
            return ask()
        except (PollardError, grpc.RpcError):
            assert time.monotonic() < give_up
            time.sleep(0.02)


def test_the_first_start_makes_a_token_shows_it_and_keeps_it_to_its_user(
    guarded: Any, admin: str
) -> None:
    # Written when all are healthy, which the fixture hears of a moment before.
    give_up = time.monotonic() + 30
    while "tokens create" not in guarded.said() and time.monotonic() < give_up:
        time.sleep(0.02)
    said = guarded.said()
    assert said.count(admin) == 1
    assert f"export POLLARD_TOKEN={admin}" in said
    folder = guarded.data_dir / "models" / "tokens"
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server = (folder / "server.token").read_text().strip()
    assert server not in said


def test_a_token_lets_in_until_it_is_revoked_everywhere(guarded: Any, served: ModelsClient) -> None:
    made = served.create_token("camera", "predictor", ttl_seconds=3600)
    assert made.secret not in repr(made)
    with vision(guarded, made.secret) as client:
        assert until_known(lambda: client.predict(PIXELS, "m")).revision == 1
        assert until_known(lambda: infer(guarded, made.secret)) == "1"
        with ModelsClient(guarded.address("models"), token=made.secret) as own:
            assert own.caller().name == "camera"
            assert [model.name for model in own.models()] == ["m"]
            with pytest.raises(PermissionDenied, match="needs publisher"):
                own.set_alias("m", "production", 1)
        served.revoke_token(made.token.token_id)
        refused = in_the_end(lambda: client.predict(PIXELS, "m"), Unauthenticated)
        assert "revoked" in str(refused)
        in_the_end(lambda: infer(guarded, made.secret), grpc.RpcError)
    with vision(guarded, None) as client, pytest.raises(Unauthenticated, match="not known who"):
        client.predict(PIXELS, "m")
    actions = [(event.action, event.resource) for event in served.events()]
    for action in ("token.create", "token.revoke"):
        assert (action, f"tokens/{made.token.token_id}") in actions


@pytest.mark.long
def test_a_token_expires_by_itself(guarded: Any, served: ModelsClient) -> None:
    made = served.create_token("visitor", "predictor", ttl_seconds=8)
    with vision(guarded, made.secret) as client:
        until_known(lambda: client.predict(PIXELS, "m"))
        refused = in_the_end(lambda: client.predict(PIXELS, "m"), Unauthenticated)
    assert "expired" in str(refused)
    assert made.token.token_id not in [token.token_id for token in served.tokens()]
    assert made.token.token_id in [token.token_id for token in served.tokens(show_ended=True)]


def test_limits_are_those_of_the_client_behind_the_vision_service(
    guarded: Any, served: ModelsClient
) -> None:
    """One request a minute: spent at the inference service, none is left through vision."""
    limits = TokenLimits(requests_per_second=1 / 60, burst=1)
    made = served.create_token("slow", "predictor", limits=limits)
    assert until_known(lambda: infer(guarded, made.secret)) == "1"

    def ask() -> None:
        # The vision service may hear of the token a moment after the inference service.
        with contextlib.suppress(Unauthenticated):
            client.predict(PIXELS, "m")

    with vision(guarded, made.secret) as client:
        refused = in_the_end(ask, ResourceExhausted)
    assert refused.reason == "RATE_LIMIT"
    # The vision service lets the first one through: it is the inference service that refuses.
    assert "slow" in str(refused)
    # Others are not in the way of it.
    other = served.create_token("other", "predictor")
    with vision(guarded, other.secret) as client:
        assert until_known(lambda: client.predict(PIXELS, "m")).revision == 1


def test_bundles_are_stored_up_to_the_quota(
    guarded: Any, served: ModelsClient, make_bundle: Any
) -> None:
    first, second = make_bundle(seed=5).path, make_bundle(seed=6).path
    # Each is sent as a tar of 10,240 bytes, of which more than a thousand are stored.
    made = served.create_token("trainer", "publisher", limits=TokenLimits(stored_bytes=11_000))
    with ModelsClient(guarded.address("models"), token=made.secret) as own:
        assert own.push(first, "quota").revision.revision == 1
        with pytest.raises(ResourceExhausted, match="may store") as caught:
            own.push(second, "quota")
    assert caught.value.reason == "STORAGE_LIMIT"
    (revision,) = served.revisions("quota")
    assert revision.creator == f"trainer (token {made.token.token_id})"


@pytest.mark.long
def test_servers_know_tokens_while_the_manager_is_away_and_after_a_restart(
    start_up: Callable[..., Any], make_bundle: Any
) -> None:
    up = start_up("--tokens")
    token = (up.data_dir / "models" / "tokens" / "admin.token").read_text().strip()
    with ModelsClient(up.address("models"), token=token) as client:
        publish(client, make_bundle(seed=1).path)
        made: NewToken = client.create_token("camera", "predictor")
    until_known(lambda: infer(up, made.secret))
    with vision(up, made.secret) as client_:
        until_known(lambda: client_.predict(PIXELS, "m"))
        # The caches hold hashes, and no token.
        for cache in ("inference", "preprocess"):
            raw = (up.data_dir / cache / "access.bin").read_bytes()
            assert made.token.token_id.encode() in raw
            assert made.secret.encode() not in raw
        # A manager that cannot start again: its store has another's lock, so to speak.
        store = up.data_dir / "models"
        os.rename(store / "registry.sqlite", store / "hidden")
        (store / "registry.sqlite").mkdir()
        up.kill("models")
        killed = up.kill("inference")
        give_up = time.monotonic() + 60
        while True:
            try:
                assert client_.predict(PIXELS, "m").revision == 1
                break
            except Exception:
                assert time.monotonic() < give_up
                time.sleep(0.1)
        assert killed["inference"] != 0


@pytest.mark.long
def test_the_commands_make_list_and_revoke(
    guarded: Any, admin: str, served: ModelsClient, pollard: Callable[..., Any], tmp_path: Path
) -> None:
    env = {"POLLARD_MODELS_ADDRESS": guarded.address("models"), "POLLARD_TOKEN": admin}

    def run(*arguments: str, token: str | None = admin) -> Any:
        return pollard("tokens", *arguments, env=env | {"POLLARD_TOKEN": token or ""})

    done = run(
        *("create", "gate-7", "--role", "predictor", "--expires", "12h"),
        *("--rate", "50", "--concurrent", "4", "--message-size", "4MB"),
    )
    assert done.returncode == 0, done.stderr
    secret = done.stdout.strip()
    assert re.fullmatch(r"plrd_[a-z2-7]{10}_[a-z2-7]{52}", secret)
    assert secret not in done.stderr
    token_id = secret.split("_")[1]

    listed = run("list")
    assert token_id in listed.stdout
    assert "50/s, 4 in flight, messages 4.0 MB" in listed.stdout
    assert secret not in listed.stdout
    (entry,) = [
        each for each in json.loads(run("list", "--json").stdout) if each["name"] == "gate-7"
    ]
    assert entry["limits"]["message_bytes"] == 4_000_000

    assert "gate-7, predictor, by token" in run("whoami", token=secret).stdout
    refused = run("create", "Gate 7", "--role", "viewer")
    assert refused.returncode == 2
    assert "name 'Gate 7' is not valid" in refused.stderr
    assert "model" not in refused.stderr
    refused = run("list", token=secret)
    assert refused.returncode == 1
    assert "needs admin (ROLE_MISSING)" in refused.stderr
    assert run("revoke", token_id).returncode == 0
    refused = run("whoami", token=secret)
    assert refused.returncode == 1
    assert "was revoked" in refused.stderr
    assert secret not in refused.stderr
    assert run("whoami", token=None).returncode == 1
    wrong = run("create", "x", "--role", "root")
    assert wrong.returncode == 2
    assert "viewer, predictor" in wrong.stderr
    assert run("create", "x", "--role", "viewer", "--expires", "soon").returncode == 2


def test_no_secret_is_in_any_log_or_page(guarded: Any, admin: str, served: ModelsClient) -> None:
    planted = "plrd_" + "planted2aa" + "_" + "planted" * 7 + "aaa"
    for service in ("models", "preprocess", "inference"):
        with grpc.insecure_channel(guarded.address(service)) as channel:
            for path in (
                "/pollard.models.v1.ModelService/ListModels",
                "/inference.GRPCInferenceService/ModelInfer",
                "/pollard.vision.v1.VisionService/Predict",
            ):
                for text in (f"Bearer {planted}", f"Basic {planted}", planted):
                    with pytest.raises(grpc.RpcError) as caught:
                        channel.unary_unary(path)(
                            b"", timeout=20, metadata=(("authorization", text),)
                        )
                    assert planted not in str(caught.value)
    for service in guarded.ready["services"].values():
        for path in ("/metrics", "/nothing"):
            connection = http.client.HTTPConnection("127.0.0.1", service["http_port"], timeout=20)
            connection.request("GET", path, headers={"Authorization": f"Bearer {planted}"})
            answer = connection.getresponse()
            assert answer.status == 401
            assert planted not in answer.read().decode()
            connection.close()
    server = (guarded.data_dir / "models" / "tokens" / "server.token").read_text().strip()
    said = guarded.said()
    assert "TOKEN_UNKNOWN" in said
    assert planted not in said
    assert server not in said
    assert said.count(admin) == 1


@pytest.mark.long
def test_a_viewers_token_is_enough_to_see_what_is_going_on(
    guarded: Any, served: ModelsClient, pollard: Any
) -> None:
    made = served.create_token("screen", "viewer", ttl_seconds=3600)
    env = {
        "POLLARD_MODELS_ADDRESS": guarded.address("models"),
        "POLLARD_TOKEN": made.secret,
        "COLUMNS": "80",
    }
    shown = pollard("top", "--once", "--json", env=env)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert [(row["model"], row["revision"]) for row in found["revisions"]] == [("m", 1)]
    assert {state for row in found["revisions"] for state in row["states"].values()} == {"READY"}
    assert found["rates_over_seconds"] > 0
    assert made.secret not in shown.stdout + shown.stderr
    refused = pollard("top", "--once", env=env | {"POLLARD_TOKEN": ""})
    assert refused.returncode == 1
    assert "not known who calls" in refused.stderr
    assert "taken from POLLARD_TOKEN" in refused.stderr
