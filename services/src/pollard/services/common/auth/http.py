"""The gate before what a service answers over HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from pollard.services.common.auth.callers import Caller, Role
from pollard.services.common.auth.gate import AUTHORIZATION, Gate
from pollard.services.common.errors import ServiceError, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from aiohttp import web


def http_guard(
    gate: Gate, role: Role = Role.VIEWER
) -> Callable[[web.Request], Awaitable[None]] | None:
    """Return what lets those in who have `role`; None where everybody may do everything."""
    if not gate.enforced:
        return None

    async def guard(request: web.Request) -> None:
        caller_of_request(gate, request, role)

    return guard


def caller_of_request(gate: Gate, request: web.Request, role: Role = Role.VIEWER) -> Caller:
    """Return who sends a request, if they have `role`.

    Raises:
        aiohttp.web.HTTPUnauthorized: it is not known who.
        aiohttp.web.HTTPForbidden: it is, and they may not.
        aiohttp.web.HTTPServiceUnavailable: it cannot be known yet.
    """
    from aiohttp import web

    shown = request.headers.getall(AUTHORIZATION, [])
    try:
        # Of two headers both are lost: one was put there by somebody else.
        text = shown[0] if len(shown) == 1 else "twice" if shown else ""
        caller = gate.identify(text, lambda: _names(request))
    except Unauthenticated as error:
        raise web.HTTPUnauthorized(
            text=f"{error.message}\n", headers={"WWW-Authenticate": 'Bearer realm="pollard"'}
        ) from None
    except Unavailable as error:
        raise web.HTTPServiceUnavailable(text=f"{error.message}\n") from None
    except ServiceError as error:
        raise web.HTTPForbidden(text=f"{error.message}\n") from None
    if caller.kind != "open" and not caller.may(role):
        raise web.HTTPForbidden(
            text=f"{caller.name} has the role {caller.role.value}, and this needs {role.value}\n"
        )
    return caller


def _names(request: Any) -> list[str]:
    """Return the names in a client's certificate, that of the subject last."""
    found = request.transport.get_extra_info("peercert") if request.transport is not None else None
    if not found:
        return []
    names = [value for _, value in found.get("subjectAltName", ())]
    subject = [pair for part in found.get("subject", ()) for pair in part]
    return names + [value for key, value in subject if key == "commonName"]
