"""JSON Web Tokens of somebody else's login, checked against that party's public keys.

Keys come from a file or a URL (a JWKS) and are read again now and then, and when a token names a
key that is not among them. Reading never holds up a call: it happens in a thread of its own.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from pollard.services.common.auth.callers import Caller, Role
from pollard.services.common.auth.errors import AccessUnknown, CredentialEnded, CredentialInvalid
from pollard.services.common.errors import StartupError

_log = structlog.get_logger("pollard.auth")

ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
"""Signatures with a public key only: a key that everybody may read must not be able to sign."""

MAX_LENGTH = 16 * 1024
"""Longest token, in characters."""

_MAX_KEYS_BYTES = 1 << 20
_REFRESH_SECONDS = 300.0
_AGAIN_SECONDS = 10.0
"""Shortest time between two readings: tokens that name unknown keys cost no more than that."""
_FETCH_TIMEOUT_SECONDS = 10.0
_LEEWAY_SECONDS = 5.0
"""Clocks differ."""


@dataclass(frozen=True)
class JwtRules:
    """Which JSON Web Tokens count, and where in them the role is."""

    keys: str
    """File or URL of the JWKS."""
    audience: str
    """`aud` that tokens must have: those made for others are refused."""
    issuer: str = ""
    """`iss` that tokens must have; empty does not look."""
    role_claim: str = "pollard_role"
    """Claim with the role or a list of roles; dots lead into objects."""

    def __post_init__(self) -> None:
        if "://" in self.keys:
            url = urllib.parse.urlsplit(self.keys)
            local = url.hostname in ("localhost", "127.0.0.1", "::1")
            if url.scheme != "https" and not (url.scheme == "http" and local):
                raise ValueError(
                    f"the keys of JSON Web Tokens come by https, not {url.scheme}: whoever changes "
                    "them on the way is let in"
                )
        if not self.audience:
            raise ValueError(
                "jwt_keys needs jwt_audience: without it, tokens that were made for other programs "
                "would count here"
            )


class JwtKeys:
    """The keys of one JWKS, kept current."""

    def __init__(self, source: str) -> None:
        """Read them for the first time.

        Raises:
            StartupError: a file is none or holds no keys. A URL is read while the server starts,
                and again if it does not answer.
        """
        self._source = source
        self._by_id: dict[str, Any] = {}
        self._read = 0.0
        self._tried = -_AGAIN_SECONDS
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        if "://" in source:
            self._refresh_soon(time.monotonic())
        else:
            try:
                self._take(self._load())
            except (OSError, ValueError) as error:
                raise StartupError(f"{source} holds no keys as a JWKS: {error}") from error

    def key(self, key_id: str) -> Any:
        """Return the key of this id; the only one if tokens name none.

        Raises:
            AccessUnknown: no keys could be read yet.
            CredentialInvalid: there is no such key, as far as is known now.
        """
        now = time.monotonic()
        if now - self._read > _REFRESH_SECONDS:
            self._refresh_soon(now)
        found = self._by_id.get(key_id)
        if found is None and not key_id and len(self._by_id) == 1:
            found = next(iter(self._by_id.values()))
        if found is not None:
            return found
        self._refresh_soon(now)
        if not self._by_id:
            raise AccessUnknown("the keys of JSON Web Tokens could not be read yet; try again")
        raise CredentialInvalid(
            "the JSON Web Token is signed with a key that is not known here", reason="TOKEN_FOREIGN"
        )

    def _refresh_soon(self, now: float) -> None:
        with self._lock:
            if now - self._tried < _AGAIN_SECONDS:
                return
            self._tried = now
        threading.Thread(target=self._refresh, name="jwt-keys", daemon=True).start()

    def _refresh(self) -> None:
        self._tried = time.monotonic()
        try:
            self._take(self._load())
        except (OSError, ValueError, http.client.HTTPException) as error:
            _log.warning(
                "keys of JSON Web Tokens cannot be read", source=self._shown, why=str(error)
            )

    @property
    def _shown(self) -> str:
        # A URL may hold a password.
        return self._source.partition("?")[0].rpartition("@")[2]

    def _load(self) -> dict[str, Any]:
        if "://" in self._source:
            request = _request(self._source)
            with urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT_SECONDS) as answer:  # noqa: S310 - as above
                raw = answer.read(_MAX_KEYS_BYTES + 1)
        else:
            with Path(self._source).open("rb") as file:
                raw = file.read(_MAX_KEYS_BYTES + 1)
        if len(raw) > _MAX_KEYS_BYTES:
            raise ValueError(f"more than {_MAX_KEYS_BYTES} bytes")
        found = json.loads(raw)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found

    def _take(self, found: Mapping[str, Any]) -> None:
        import jwt

        keys: dict[str, Any] = {}
        for entry in found.get("keys", ()):
            # Keys that both sides know are no public keys, whatever the file says.
            if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC", "OKP"):
                continue
            try:
                keys[str(entry.get("kid", ""))] = jwt.PyJWK(entry)
            except jwt.PyJWTError:
                continue
        if not keys:
            raise ValueError("there is no public key in it")
        self._by_id = keys
        self._read = time.monotonic()


def _request(source: str) -> urllib.request.Request:
    """Return the request for a URL; user and password in it go where HTTP has them."""
    parts = urllib.parse.urlsplit(source)
    user, at, place = parts.netloc.rpartition("@")
    headers = {"Accept": "application/json"}
    if at:
        shown = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        headers["Authorization"] = f"Basic {shown}"
    return urllib.request.Request(parts._replace(netloc=place).geturl(), headers=headers)  # noqa: S310 - JwtRules looks at the scheme


class JwtChecker:
    """Tells who shows a JSON Web Token."""

    def __init__(self, rules: JwtRules) -> None:
        """Read the keys.

        Raises:
            StartupError: a file of keys is none.
        """
        self._rules = rules
        self._keys = JwtKeys(rules.keys)

    def caller(self, token: str) -> Caller:
        """Return whose token it is.

        Raises:
            CredentialInvalid: it is not signed by a known key, not for this audience, or has no
                role or subject.
            CredentialEnded: it has expired.
            AccessUnknown: no keys could be read yet.
        """
        import jwt

        rules = self._rules
        if len(token) > MAX_LENGTH:
            raise CredentialInvalid("the JSON Web Token is too long", reason="TOKEN_MALFORMED")
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in ALGORITHMS:
                raise CredentialInvalid(
                    "the JSON Web Token is not signed with a public key's algorithm",
                    reason="TOKEN_MALFORMED",
                )
            key = self._keys.key(str(header.get("kid", "")))
            claims = jwt.decode(
                token,
                key.key,
                # The key's own: one of another kind must not be taken for it.
                algorithms=[key.algorithm_name],
                audience=rules.audience,
                issuer=rules.issuer or None,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "sub", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise CredentialEnded(
                "the JSON Web Token has expired; log in again", reason="TOKEN_EXPIRED"
            ) from None
        except jwt.InvalidAudienceError:
            raise CredentialInvalid(
                f"the JSON Web Token was made for another audience than {rules.audience!r}",
                reason="TOKEN_FOREIGN",
                audience=rules.audience,
            ) from None
        except jwt.InvalidIssuerError:
            raise CredentialInvalid(
                f"the JSON Web Token is not by the issuer {rules.issuer!r}",
                reason="TOKEN_FOREIGN",
                issuer=rules.issuer,
            ) from None
        except jwt.InvalidSignatureError:
            raise CredentialInvalid(
                "the JSON Web Token's signature is wrong", reason="TOKEN_FOREIGN"
            ) from None
        except jwt.PyJWTError:
            # Its message may quote the token.
            raise CredentialInvalid(
                "the JSON Web Token cannot be read, or lacks exp, sub or aud",
                reason="TOKEN_MALFORMED",
            ) from None
        subject = str(claims["sub"])[:128]
        return Caller(
            name=subject,
            role=_role_of(claims, rules.role_claim),
            kind="jwt",
            key=f"jwt:{subject}",
            expires=float(claims["exp"]) + _LEEWAY_SECONDS,
        )


def _role_of(claims: Mapping[str, Any], path: str) -> Role:
    found: Any = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    given: Sequence[Any] = found if isinstance(found, list) else (found,)
    roles = [Role(name) for name in given if isinstance(name, str) and name in set(Role)]
    if not roles:
        raise CredentialInvalid(
            f"the JSON Web Token has no role of Pollard's in its claim {path!r}; there are "
            f"{', '.join(Role)}",
            reason="TOKEN_WITHOUT_ROLE",
            claim=path,
        )
    best = roles[0]
    for role in roles[1:]:
        if role.includes(best):
            best = role
    return best
