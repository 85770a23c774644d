"""The gate before every method: who calls, and may they?

One gate a server. It knows nothing of gRPC: front ends give it the header, and the names of a
client's certificate where there is one. A token costs a hash and a look into a table; what took
longer to check, a JSON Web Token's signature, is remembered by its hash until it expires.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from pollard.services.common.auth.callers import OPEN, UNLIMITED, Caller, Limits, Role
from pollard.services.common.auth.errors import (
    AccessUnknown,
    CredentialEnded,
    CredentialInvalid,
    CredentialMissing,
    RoleMissing,
)
from pollard.services.common.auth.jwts import MAX_LENGTH, JwtChecker, JwtRules
from pollard.services.common.auth.open_calls import OpenCalls
from pollard.services.common.auth.refusals import RefusalLog
from pollard.services.common.auth.roles import ACCESS, Access
from pollard.services.common.auth.tokens import EMPTY, PREFIX, TokenTable, digest_of, id_of
from pollard.services.common.auth.usage import Lease, UsageBook
from pollard.services.common.errors import ServiceError

AUTHORIZATION = "authorization"
"""Metadata key, and header, with "Bearer TOKEN"."""

BEHALF = "pollard-on-behalf-of"
"""Metadata key in which a service says for whom it calls; believed of services only."""

_SCHEME = "bearer "
_REMEMBERED = 4096
_NO_NAMES: Sequence[str] = ()

Names = Callable[[], Iterable[str]]
"""Gives the names in a client's certificate."""


@dataclass(frozen=True)
class GateRules:
    """Whom a server lets in."""

    tokens: bool = False
    """Whoever shows a token that the manager knows."""
    jwt: JwtRules | None = None
    """Whoever shows a JSON Web Token by these rules."""
    certificates: tuple[tuple[str, Role], ...] = ()
    """Whoever shows a certificate with one of these names; "*" is any, "*.x" any that ends so. The
    first that fits decides."""
    limits: Limits = UNLIMITED
    """Of each caller whose token does not say otherwise."""

    @property
    def enforced(self) -> bool:
        """Whether anything has to be shown at all."""
        return self.tokens or self.jwt is not None or bool(self.certificates)


EVERYBODY = GateRules()
"""Nobody has to show anything."""


class Gate:
    """Tells who calls and refuses who may not."""

    def __init__(self, rules: GateRules = EVERYBODY) -> None:
        """Begin, with no tokens known.

        Raises:
            StartupError: the file of keys for JSON Web Tokens is none.
        """
        self.rules = rules
        self.enforced = rules.enforced
        self.usage = UsageBook()
        self._jwt = JwtChecker(rules.jwt) if rules.jwt is not None else None
        self._table = EMPTY
        self._limits_by_id: Mapping[str, Limits] = {}
        self._heard = False
        self._remembered: dict[bytes, Caller] = {}
        self._refusals = RefusalLog()
        self.open_calls = OpenCalls(self.ended)
        """Streams, which end with their callers' tokens."""

    def know(self, table: TokenTable) -> None:
        """Take the tokens that count from now on."""
        limits = {
            token.token_id: token.limits.over(self.rules.limits)
            for token in table.by_id.values()
            if token.limits is not None
        }
        self._limits_by_id, self._table, self._heard = limits, table, True
        self.open_calls.check()

    def ended(self, caller: Caller) -> ServiceError | None:
        """Return why a caller that was let in is not known any more; None if it is."""
        if caller.kind == "token" and caller.key.startswith("token:"):
            token_id = caller.key.removeprefix("token:")
            known = self._table.by_id.get(token_id)
            if self._heard and (known is None or known.revoked):
                return _revoked(token_id, caller.name)
        if caller.expires is not None and time.time() >= caller.expires:
            if caller.kind == "jwt":
                return CredentialEnded(
                    "the JSON Web Token has expired; log in again", reason="TOKEN_EXPIRED"
                )
            return _expired(caller.key.removeprefix("token:"), caller.name)
        return None

    def admit(
        self,
        method: str,
        authorization: str | bytes = "",
        behalf: str | bytes = "",
        names: Names | None = None,
    ) -> Caller:
        """Return who calls, if they may.

        Args:
            method: Path, such as "/pollard.vision.v1.VisionService/Predict".
            authorization: The header of that name; empty if there is none.
            behalf: The metadata `BEHALF`; empty if there is none.
            names: Gives the names in the client's certificate.

        Raises:
            Unauthenticated: it is not known who calls.
            PermissionDenied: it is, and they may not.
            Unavailable: it cannot be known yet.
        """
        if not self.enforced:
            return OPEN
        access = ACCESS.get(method)
        if access is not None and access.role is None:
            return OPEN
        try:
            caller = self.identify(authorization, names)
            self._check(method, access, caller)
        except ServiceError as error:
            self._refusals.note(method, error)
            raise
        if behalf and caller.role is Role.SERVER:
            return self._on_behalf(behalf, caller)
        return caller

    def enter(self, method: str, caller: Caller) -> Lease:
        """Count a call that was admitted; close what is returned when it has ended.

        Raises:
            LimitReached: the caller uses as much as it may.
        """
        try:
            return self.usage.enter(caller, stream=method in STREAMS)
        except ServiceError as error:
            self._refusals.note(method, error)
            raise

    def identify(self, authorization: str | bytes, names: Names | None = None) -> Caller:
        """Return who shows this; `OPEN` where nobody has to show anything.

        Raises:
            Unauthenticated: nobody that is known.
            Unavailable: it cannot be known yet.
        """
        if not self.enforced:
            return OPEN
        if authorization:
            text = (
                authorization
                if isinstance(authorization, str)
                else authorization.decode("latin-1", "replace")
            )
            if text[: len(_SCHEME)].lower() != _SCHEME:
                raise CredentialInvalid(
                    'the header "authorization" must be "Bearer TOKEN"', reason="TOKEN_MALFORMED"
                )
            return self.caller_of_token(text[len(_SCHEME) :].strip())
        if self.rules.certificates and names is not None:
            for name in names():
                role = self._role_of_name(name)
                if role is not None:
                    return Caller(
                        name, role, "certificate", f"certificate:{name}", limits=self.rules.limits
                    )
        raise CredentialMissing(self._how())

    def caller_of_headers(self, headers: Mapping[str, str]) -> Caller:
        """Return who sends an HTTP request with these headers; keys in lower case.

        Raises:
            Unauthenticated: nobody that is known.
            Unavailable: it cannot be known yet.
        """
        return self.identify(headers.get(AUTHORIZATION, ""))

    def caller_of_token(self, token: str) -> Caller:
        """Return whose token this is.

        Raises:
            CredentialInvalid: nobody's.
            CredentialEnded: it was somebody's.
            AccessUnknown: it cannot be known yet.
        """
        if token.startswith(PREFIX):
            return self._caller_of_own(token)
        if self._jwt is not None and token.count(".") == 2 and len(token) <= MAX_LENGTH:
            return self._caller_of_jwt(token)
        raise CredentialInvalid(
            "what was shown has not the form of a token", reason="TOKEN_MALFORMED"
        )

    def _caller_of_own(self, token: str) -> Caller:
        known = self._table.by_digest.get(digest_of(token))
        if known is None:
            token_id = id_of(token)
            if not token_id:
                raise CredentialInvalid(
                    "what was shown has not the form of a token; perhaps it was cut",
                    reason="TOKEN_MALFORMED",
                )
            if self.rules.tokens and not self._heard:
                raise AccessUnknown(
                    "this server has not heard from the manager yet which tokens there are; "
                    "try again"
                )
            raise CredentialInvalid(
                f"the token {token_id} is not known here", reason="TOKEN_UNKNOWN", token=token_id
            )
        if known.revoked:
            raise _revoked(known.token_id, known.name)
        if known.expires is not None and time.time() >= known.expires:
            raise _expired(known.token_id, known.name)
        return Caller(
            known.name,
            known.role,
            "token",
            f"token:{known.token_id}",
            known.expires,
            self._limits(known.token_id, known.role),
        )

    def _caller_of_jwt(self, token: str) -> Caller:
        assert self._jwt is not None  # noqa: S101 - whoever calls has looked
        digest = digest_of(token)
        caller = self._remembered.get(digest)
        if caller is not None and caller.expires is not None and time.time() < caller.expires:
            return caller
        found = self._jwt.caller(token)
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        caller = Caller(
            found.name,
            found.role,
            found.kind,
            found.key,
            found.expires,
            self._limits("", found.role),
        )
        self._remembered[digest] = caller
        return caller

    def _limits(self, token_id: str, role: Role) -> Limits:
        """Return a caller's limits; services have none, those they call for have."""
        if role is Role.SERVER:
            return UNLIMITED
        return self._limits_by_id.get(token_id, self.rules.limits)

    def _role_of_name(self, name: str) -> Role | None:
        for pattern, role in self.rules.certificates:
            if pattern in ("*", name) or (pattern[:2] == "*." and name.endswith(pattern[1:])):
                return role
        return None

    def _check(self, method: str, access: Access | None, caller: Caller) -> None:
        if access is not None and access.allows(caller):
            return
        if access is None:
            raise RoleMissing(f"nobody may call {method}", method=method)
        raise RoleMissing(
            f"{caller.name} has the role {caller.role.value}, and {method.rpartition('/')[2]} "
            f"needs {access.words}",
            method=method,
            role=caller.role.value,
            needed=access.words,
        )

    def _on_behalf(self, behalf: str | bytes, server: Caller) -> Caller:
        """Return the client that a service calls for; the service itself if it says nonsense."""
        text = behalf if isinstance(behalf, str) else behalf.decode("latin-1", "replace")
        parts = [unquote(part) for part in text.split(" ")]
        if len(parts) != 3 or len(text) > 1024 or parts[0] not in set(Role):
            return server
        role, key, name = Role(parts[0]), parts[1], parts[2]
        limits = self._limits(key.removeprefix("token:"), role)
        return Caller(name, role, "token", key, limits=limits).through(server)

    def _how(self) -> str:
        ways = []
        if self.rules.tokens or self.rules.jwt is not None:
            ways.append('send a token in the metadata "authorization: Bearer TOKEN"')
        if self.rules.certificates:
            ways.append("show a certificate that this server knows")
        return f"it is not known who calls: {' or '.join(ways)}"


def _revoked(token_id: str, name: str) -> CredentialEnded:
    return CredentialEnded(
        f"the token {token_id} ({name}) was revoked", reason="TOKEN_REVOKED", token=token_id
    )


def _expired(token_id: str, name: str) -> CredentialEnded:
    return CredentialEnded(
        f"the token {token_id} ({name}) has expired; ask for a new one",
        reason="TOKEN_EXPIRED",
        token=token_id,
    )


def behalf_of(caller: Caller) -> str:
    """Return how a service names the client that it calls for, as the metadata `BEHALF`."""
    return " ".join(
        quote(part, safe=":") for part in (caller.role.value, caller.key, caller.name or "-")
    )


STREAMS = frozenset(
    {
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/pollard.models.v1.FleetService/Sync",
        "/pollard.models.v1.ModelService/DownloadBundle",
        "/pollard.models.v1.ModelService/UploadBundle",
        "/pollard.models.v1.ModelService/VerifyStore",
        "/pollard.models.v1.ModelService/WatchEvents",
        "/pollard.preprocess.v1.PreprocessService/TransformStream",
        "/pollard.vision.v1.VisionService/PredictStream",
    }
)
"""Methods one side of which is a stream; a test compares them with the contracts."""
