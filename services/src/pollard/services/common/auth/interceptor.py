"""The gate before the methods of grpcio's server."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import grpc

from pollard.services.common.auth.callers import Caller, set_caller
from pollard.services.common.auth.gate import AUTHORIZATION, BEHALF, Gate
from pollard.services.common.auth.roles import ACCESS
from pollard.services.common.auth.usage import Lease
from pollard.services.common.errors import ServiceError
from pollard.services.common.handlers import WrappedHandlers, function_of, with_function
from pollard.services.common.status import abort

_admitted: ContextVar[Caller | None] = ContextVar("pollard_admitted", default=None)

_NAME_KEYS = ("x509_subject_alternative_name", "x509_common_name")


def credentials_of(
    metadata: Iterable[tuple[str, str | bytes]] | None,
) -> tuple[str | bytes, str | bytes]:
    """Return what a call shows, and for whom it says to be made.

    Of two headers of the same name both are lost: one of them was put there by somebody else.
    """
    shown: str | bytes = ""
    behalf: str | bytes = ""
    for key, value in metadata or ():
        if key == AUTHORIZATION:
            shown = "twice" if shown else value
        elif key == BEHALF:
            behalf = "twice" if behalf else value
    return shown, behalf


def names_of(auth_context: Mapping[str, Iterable[bytes]]) -> list[str]:
    """Return the names in a client's certificate, that of the subject last."""
    return [
        name.decode("utf-8", "replace") for key in _NAME_KEYS for name in auth_context.get(key, ())
    ]


class GateInterceptor(grpc.aio.ServerInterceptor):
    """Refuses who may not call, before anything of the request is read."""

    def __init__(self, gate: Gate) -> None:
        """Ask `gate`."""
        self._gate = gate
        self._wrapped = WrappedHandlers()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Ask the gate, and have the method ask for its limits."""
        handler = await continuation(handler_call_details)
        gate = self._gate
        if handler is None or not gate.enforced:
            return handler
        method: str = handler_call_details.method
        access = ACCESS.get(method)
        if access is not None and access.role is None:
            return handler
        shown, behalf = credentials_of(handler_call_details.invocation_metadata)
        if shown or not gate.rules.certificates:
            try:
                caller = gate.admit(method, shown, behalf)
            except ServiceError as error:
                return _refusing(error, handler)
            _admitted.set(caller)
        return self._wrapped.of(method, handler, lambda: _wrap(gate, method, handler))


def _refusing(error: ServiceError, handler: Any) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    # What it would be if it were not refused, for whoever counts calls by their kind.
    refuse.refuses = handler  # type: ignore[attr-defined]  # functions take any attribute
    # As for a stream of requests, whatever it is: so nothing of it is read.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _wrap(gate: Gate, method: str, handler: Any) -> Any:
    metered = ACCESS[method].metered if method in ACCESS else False

    def enter(context: Any) -> tuple[Caller, Lease]:
        caller = _admitted.get()
        if caller is None:
            _, behalf = credentials_of(context.invocation_metadata())
            caller = gate.admit(method, "", behalf, lambda: names_of(context.auth_context()))
        set_caller(caller)
        return caller, gate.enter(method, caller)

    def incoming(request: Any, lease: Lease) -> Any:
        if handler.request_streaming:
            return _checked(request, lease, metered)
        lease.check_size(size_of(request))
        return request

    body = function_of(handler)
    if handler.request_streaming or handler.response_streaming:
        return with_function(handler, _lasting(gate, enter, incoming, body))
    return with_function(handler, _coroutine(enter, incoming, body))


def _coroutine(enter: Any, incoming: Any, body: Any) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            _, lease = enter(context)
        except ServiceError as error:
            await abort(context, error)
        with lease:
            try:
                request = incoming(request, lease)
            except ServiceError as error:
                await abort(context, error)
            return await body(request, context)

    return guarded


def _lasting(gate: Gate, enter: Any, incoming: Any, body: Any) -> Any:
    """Guard a method with a stream on one of its sides: it lasts as long as its caller is known."""
    generates = inspect.isasyncgenfunction(body)

    async def guarded(request: Any, context: Any) -> Any:
        try:
            caller, lease = enter(context)
        except ServiceError as error:
            await abort(context, error)
        with lease:
            try:
                request = incoming(request, lease)
                if generates:
                    # Before anything can end the call: where headers are on their way with the
                    # first answer, gRPC takes no status, and the client would wait for ever.
                    await context.send_initial_metadata(())
                async with gate.open_calls.lasting(caller):
                    if not generates:
                        return await body(request, context)
                    # Written here, not yielded: so that also what waits for a slow client ends.
                    async with contextlib.aclosing(body(request, context)) as answers:
                        async for answer in answers:
                            await context.write(answer)
            except ServiceError as error:
                await abort(context, error)
            return None

    return guarded


async def _checked(requests: Any, lease: Lease, metered: bool) -> AsyncIterator[Any]:
    async for request in requests:
        lease.check_size(size_of(request))
        if metered:
            early = lease.pause()
            if early:
                await asyncio.sleep(early)
        yield request


def size_of(message: Any) -> int:
    """Return the size of a message as it came, in bytes."""
    return len(message) if isinstance(message, bytes) else int(message.ByteSize())
