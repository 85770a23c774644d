"""Which JSON Web Tokens count."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pollard.services.common.auth import Role, jwts
from pollard.services.common.auth.errors import AccessUnknown, CredentialEnded, CredentialInvalid
from pollard.services.common.auth.jwts import JwtChecker, JwtKeys, JwtRules
from pollard.services.common.errors import StartupError

ISSUER = "https://login.example.org"


@pytest.fixture
def issuer(make_issuer):
    return make_issuer("login")


@pytest.fixture
def checker(issuer) -> JwtChecker:
    return JwtChecker(JwtRules(str(issuer.file), "pollard", ISSUER))


def test_subject_and_role_come_from_the_claims(checker, issuer) -> None:
    caller = checker.caller(issuer.sign(pollard_role="publisher"))
    assert (caller.name, caller.role, caller.key) == ("alice", Role.PUBLISHER, "jwt:alice")


def test_the_highest_of_several_roles_counts(issuer) -> None:
    rules = JwtRules(str(issuer.file), "pollard", role_claim="realm_access.roles")
    token = issuer.sign(realm_access={"roles": ["offline", "viewer", "publisher", "predictor"]})
    assert JwtChecker(rules).caller(token).role is Role.PUBLISHER


@pytest.mark.parametrize("kind", ["EC", "RSA"])
def test_several_keys_of_several_kinds(issuer, kind: str) -> None:
    issuer.add("second", kind)
    checker = JwtChecker(JwtRules(str(issuer.file), "pollard"))
    assert checker.caller(issuer.sign("second")).name == "alice"


@pytest.mark.parametrize(
    ("claims", "reason", "words"),
    [
        ({"aud": "another"}, "TOKEN_FOREIGN", "another audience"),
        ({"aud": None}, "TOKEN_MALFORMED", "lacks exp, sub or aud"),
        ({"iss": "https://evil.example.org"}, "TOKEN_FOREIGN", "not by the issuer"),
        ({"sub": None}, "TOKEN_MALFORMED", "lacks exp, sub or aud"),
        ({"exp": None}, "TOKEN_MALFORMED", "lacks exp, sub or aud"),
        ({"nbf": time.time() + 86_400}, "TOKEN_MALFORMED", "cannot be read"),
        ({"pollard_role": None}, "TOKEN_WITHOUT_ROLE", "no role of Pollard's"),
        ({"pollard_role": "root"}, "TOKEN_WITHOUT_ROLE", "no role of Pollard's"),
        ({"pollard_role": {"admin": True}}, "TOKEN_WITHOUT_ROLE", "no role of Pollard's"),
    ],
)
def test_claims_that_do_not_fit(checker, issuer, claims, reason: str, words: str) -> None:
    with pytest.raises(CredentialInvalid, match=words) as caught:
        checker.caller(issuer.sign(**claims))
    assert caught.value.reason == reason


def test_an_expired_one_is_refused(checker, issuer) -> None:
    with pytest.raises(CredentialEnded, match="expired"):
        checker.caller(issuer.sign(exp=time.time() - 60))


def test_a_foreign_signature_is_refused(checker, make_issuer) -> None:
    with pytest.raises(CredentialInvalid, match="signature is wrong"):
        checker.caller(make_issuer("other").sign())


def _unsigned(header: dict, claims: dict) -> str:
    parts = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
        for part in (header, claims)
    ]
    return ".".join([*parts, ""])


def test_an_unsigned_one_is_refused(checker) -> None:
    claims = {"sub": "alice", "aud": "pollard", "exp": time.time() + 60, "pollard_role": "admin"}
    for algorithm in ("none", "None", "", None):
        with pytest.raises(CredentialInvalid):
            checker.caller(_unsigned({"alg": algorithm, "kid": "first"}, claims))


def test_a_public_key_does_not_sign(checker, issuer) -> None:
    """The classic: the public key, known to all, taken for a secret that both sides share."""
    import hashlib
    import hmac

    public = issuer.public().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    claims = {"sub": "alice", "aud": "pollard", "exp": time.time() + 60, "pollard_role": "admin"}
    signed = _unsigned({"alg": "HS256", "kid": "first", "typ": "JWT"}, claims)[:-1]
    mac = hmac.new(public, signed.encode(), hashlib.sha256).digest()
    forged = f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    with pytest.raises(CredentialInvalid, match="public key's algorithm"):
        checker.caller(forged)


def test_shared_secrets_in_a_file_of_keys_do_not_count(issuer) -> None:
    secret = base64.urlsafe_b64encode(b"s" * 32).decode()
    issuer.write({"kty": "oct", "kid": "shared", "k": secret, "alg": "HS256"})
    checker = JwtChecker(JwtRules(str(issuer.file), "pollard"))
    token = jwt.encode(
        {"sub": "a", "aud": "pollard", "exp": time.time() + 60, "pollard_role": "admin"},
        b"s" * 32,
        algorithm="HS256",
        headers={"kid": "shared"},
    )
    with pytest.raises(CredentialInvalid):
        checker.caller(token)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": []}', '{"keys": [{"kty": "oct"}]}'])
def test_a_file_that_holds_no_keys_is_refused(tmp_path, text: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(StartupError, match=r"keys\.json"):
        JwtChecker(JwtRules(str(file), "pollard"))


@pytest.mark.parametrize(
    ("keys", "audience", "words"),
    [
        ("http://login.example.org/keys", "pollard", "by https"),
        ("file:///etc/passwd", "pollard", "by https"),
        ("keys.json", "", "needs jwt_audience"),
    ],
)
def test_rules_that_would_let_others_in_are_refused(keys: str, audience: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        JwtRules(keys, audience)


def test_keys_from_a_url_are_read_again_when_one_is_not_known(issuer, monkeypatch) -> None:
    monkeypatch.setattr(jwts, "_AGAIN_SECONDS", 0.0)
    asked = threading.Semaphore(0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = issuer.file.read_bytes()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)
            asked.release()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/keys"
            checker = JwtChecker(JwtRules(url, "pollard"))
            assert asked.acquire(timeout=30)
            assert _patiently(checker, issuer.sign()).name == "alice"
            issuer.add("renewed", "RSA")
            assert _patiently(checker, issuer.sign("renewed")).name == "alice"
        finally:
            server.shutdown()


def _patiently(checker: JwtChecker, token: str):
    """Ask until the thread that reads keys has them."""
    give_up = time.monotonic() + 30
    while True:
        try:
            return checker.caller(token)
        except (AccessUnknown, CredentialInvalid):
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def test_a_url_of_keys_that_cannot_be_read_is_told_without_its_password(capsys) -> None:
    keys = JwtKeys("https://reader:s3cret@h:port/keys?token=s3cret")
    with pytest.raises(AccessUnknown):
        keys.key("x")
    give_up = time.monotonic() + 30
    said = ""
    while "cannot be read" not in said and time.monotonic() < give_up:
        said += "".join(capsys.readouterr())
        time.sleep(0.02)
    assert "cannot be read" in said
    assert "s3cret" not in said


def test_keys_that_cannot_be_had_yet_are_no_reason_to_refuse_for_good() -> None:
    checker = JwtChecker(JwtRules("http://127.0.0.1:9/keys", "pollard"))
    token = _unsigned({"alg": "ES256", "kid": "x"}, {})
    with pytest.raises(AccessUnknown):
        checker.caller(token)
