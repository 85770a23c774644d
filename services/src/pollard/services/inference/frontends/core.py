"""The front end over grpcio's core: its HTTP/2 stack without its Python servers.

grpcio's servers in Python lead every call through threads, tasks and futures, which takes longer
than a small model does. Here one thread polls the core's completion queue. It reads ModelInfer,
runs what is small, hands the rest to the model's workers, and whoever has an answer sends it.
Everything else is answered on the event loop.

The core is reached through `grpc._cython.cygrpc`, on which grpcio's own servers stand, but which
grpcio does not promise to keep as it is: `missing_from_core` says what an installed one lacks.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import structlog
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # a compiled module

from pollard.services.common.auth.gate import AUTHORIZATION, BEHALF
from pollard.services.common.auth.interceptor import names_of
from pollard.services.common.auth.usage import Lease
from pollard.services.common.errors import ServiceError, StartupError
from pollard.services.common.lifecycle import HealthPort, Listen, server_options
from pollard.services.common.routing import ALIAS_METADATA, STICKY_METADATA
from pollard.services.common.shadows import SHADOW_METADATA
from pollard.services.common.telemetry.record import CallRecord, set_call
from pollard.services.common.telemetry.request_ids import REQUEST_ID
from pollard.services.common.telemetry.traces import TRACEPARENT, TRACESTATE
from pollard.services.common.tls import server_credentials
from pollard.services.inference.frontends.calls import MODEL_INFER, Headers, ServerCalls
from pollard.services.inference.frontends.core_calls import InferCall, LoopCall, refuse
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.servicer import SERVICE_NAME, STREAM_STATUS_METADATA
from pollard.services.inference.workers import Work

_log = structlog.get_logger("pollard.inference.core")

_WAITING_CALLS = 16
"""Calls that the core may hand over before it is asked for more."""

_MOST_GATHERED = 32
"""Requests that are read before those that came are run: more make larger batches, and keep
others waiting."""

_KNOWN = frozenset(
    {
        ALIAS_METADATA,
        STICKY_METADATA,
        SHADOW_METADATA,
        STREAM_STATUS_METADATA,
        AUTHORIZATION,
        BEHALF,
        REQUEST_ID,
        TRACEPARENT,
        TRACESTATE,
    }
)
"""Keys that `headers_of` reads; most metadata have others."""

_NEEDED = (
    "CompletionQueue",
    "CompletionType",
    "ReceiveCloseOnServerOperation",
    "ReceiveMessageOperation",
    "SendInitialMetadataOperation",
    "SendMessageOperation",
    "SendStatusFromServerOperation",
    "Server",
)
_NEEDED_OF_SERVER = (
    "add_http2_port",
    "cancel_all_calls",
    "destroy",
    "register_completion_queue",
    "register_method",
    "request_call",
    "request_registered_call",
    "shutdown",
    "start",
)


def missing_from_core() -> list[str]:
    """Name what this front end needs and the installed grpcio does not have."""
    missing = [name for name in _NEEDED if not hasattr(cygrpc, name)]
    server = getattr(cygrpc, "Server", None)
    return missing + [f"Server.{name}" for name in _NEEDED_OF_SERVER if not hasattr(server, name)]


class CoreFront:
    """Stands where `GrpcServer` stands: listens, answers, stops."""

    def __init__(self, listen: Listen, calls: ServerCalls) -> None:
        """Take what to answer with; must be made on the event loop's thread.

        Raises:
            StartupError: the address would be open to everybody, or grpcio's core is another one.
        """
        listen.check()
        missing = missing_from_core()
        if missing:
            raise StartupError(
                f"the installed grpcio lacks {', '.join(missing)}, which --frontend core needs; "
                "use --frontend grpcio"
            )
        self.port = 0
        self.calls = calls
        self.engine = calls.engine
        self.loop = asyncio.get_running_loop()
        self._listen = listen
        self._credentials = server_credentials(listen.tls)
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(server_options(listen.max_message_bytes)), False)
        self._server.register_completion_queue(self._queue)
        self._server.register_method(MODEL_INFER)
        self.health_port = HealthPort()
        self._started = False
        self._stopping = False
        self._gathered: list[tuple[LoadedRevision, Work]] = []
        self._thread = threading.Thread(target=self._poll, name="grpc-core", daemon=True)

    @property
    def address(self) -> str:
        """Target under which this machine reaches the server."""
        host = "127.0.0.1" if self._listen.host in ("0.0.0.0", "::") else self._listen.host  # noqa: S104 - compared, not bound
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    async def start(self) -> None:
        """Bind and begin to answer; health says NOT_SERVING until told otherwise.

        Raises:
            StartupError: the address cannot be had.
        """
        self.calls.set_serving(False)
        host = f"[{self._listen.host}]" if ":" in self._listen.host else self._listen.host
        address = f"{host}:{self._listen.port}"
        self.port = self._bind(address, self._credentials)
        if not self.port:
            raise StartupError(
                f"cannot listen on {address}: the port is in use or the address is not this "
                "machine's; stop the other program or choose another --port"
            )
        if self._listen.unix_socket and not self._bind(f"unix:{self._listen.unix_socket}"):
            raise StartupError(f"cannot listen on the socket {self._listen.unix_socket}")
        self._server.start()
        self._started = True
        for _ in range(_WAITING_CALLS):
            self._ask_for_infer()
            self._ask_for_call()
        self._thread.start()
        await self.health_port.set_serving(False)
        await self.health_port.start(self._listen)

    @property
    def serving(self) -> bool:
        """What health says."""
        return self.calls.serving

    async def set_serving(self, serving: bool) -> None:
        """Tell health."""
        self.calls.set_serving(serving)
        await self.health_port.set_serving(serving, [SERVICE_NAME])

    def stop_streams(self) -> None:
        """Read no more from streams, and end each when what was read has been answered."""
        self.calls.set_serving(False)
        self.calls.stopping.set()

    async def stop(self, grace_seconds: float) -> None:
        """Finish the calls in flight for at most `grace_seconds`, then close; once is enough."""
        self.stop_streams()
        await self.health_port.stop()
        if not self._started or self._stopping:
            return
        ended = asyncio.Event()
        self._stopping = True
        self._server.shutdown(self._queue, lambda _: self.loop.call_soon_threadsafe(ended.set))
        try:
            await asyncio.wait_for(ended.wait(), grace_seconds)
        except TimeoutError:
            self._server.cancel_all_calls()
            await ended.wait()
        self._server.destroy()
        self._queue.shutdown()
        await asyncio.to_thread(self._thread.join)

    def gather(self, revision: LoadedRevision, work: Work) -> None:
        """Run a small request with those that came with it; on the polling thread."""
        self._gathered.append((revision, work))

    def _bind(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        try:
            port: int = self._server.add_http2_port(
                address.encode(),
                # As grpcio's servers do it.
                None if credentials is None else credentials._credentials,  # type: ignore[attr-defined]
            )
        except RuntimeError:
            return 0
        return port

    def _poll(self) -> None:
        poll, gathered = self._queue.poll, self._gathered
        nothing = cygrpc.CompletionType.queue_timeout
        closed = cygrpc.CompletionType.queue_shutdown
        while True:
            # With requests to run, only look whether more have come.
            event = poll(0.0) if gathered else poll()
            kind = event.completion_type
            if kind == nothing:
                self._run_gathered()
                continue
            if kind == closed:
                return
            try:
                event.tag(event)
            except Exception:
                _log.exception("an event of the core could not be handled")
            if len(gathered) >= _MOST_GATHERED:
                self._run_gathered()
            # A call lives as long as its event.
            event = None

    def _run_gathered(self) -> None:
        by_revision: dict[LoadedRevision, list[Work]] = {}
        for revision, work in self._gathered:
            by_revision.setdefault(revision, []).append(work)
        self._gathered.clear()
        for revision, works in by_revision.items():
            try:
                revision.run_here(works)
            except Exception as error:
                # This thread must live on, and nobody may wait for ever.
                _log.exception("requests could not be run")
                for work in works:
                    work.caller.settle(work, error)

    def _ask_for_infer(self) -> None:
        self._server.request_registered_call(self._queue, self._queue, MODEL_INFER, self._on_infer)

    def _ask_for_call(self) -> None:
        self._server.request_call(self._queue, self._queue, self._on_call)

    def _on_infer(self, event: Any) -> None:
        if not event.success:
            return
        if not self._stopping:
            self._ask_for_infer()
        metadata = event.invocation_metadata
        headers = headers_of(metadata, event.call_details.deadline)
        record = self.calls.begin(MODEL_INFER, headers)
        lease = None
        if self.calls.gate.enforced:
            try:
                lease = self._enter(event, MODEL_INFER, headers, record)
            except ServiceError as error:
                refuse(event.call, error, record)
                return
        if headers.shadow or self.calls.restriction(MODEL_INFER) is not None:
            self._on_loop(event, headers, record, lease)
        else:
            InferCall(self, event.call, headers, record, lease).start()

    def _on_call(self, event: Any) -> None:
        if not event.success:
            return
        if not self._stopping:
            self._ask_for_call()
        path = event.call_details.method.decode("utf-8", "replace")
        headers = headers_of(event.invocation_metadata, event.call_details.deadline)
        record = self.calls.begin(path, headers)
        lease = None
        if self.calls.gate.enforced:
            try:
                lease = self._enter(event, path, headers, record)
            except ServiceError as error:
                refuse(event.call, error, record)
                return
        self._on_loop(event, headers, record, lease)

    def _enter(self, event: Any, path: str, headers: Headers, record: CallRecord) -> Lease:
        # This thread has many calls in hand; what the gate logs is about this one.
        set_call(record)
        try:
            lease = self.calls.enter(path, headers, names_in(event.call))
        finally:
            set_call(None)
        record.caller = headers.caller.name
        return lease

    def _on_loop(
        self, event: Any, headers: Headers, record: CallRecord, lease: Lease | None
    ) -> None:
        call = LoopCall(self, event.call, headers, record, event.invocation_metadata, lease)
        self.loop.call_soon_threadsafe(call.start)


def names_in(call: Any) -> Callable[[], list[str]]:
    """Return a function that reads the names in the certificate of a call's client."""

    def names() -> list[str]:
        found = cygrpc.auth_context(call) or {}
        return names_of({key.decode(): values for key, values in found.items()})

    return names


def headers_of(metadata: Iterable[tuple[str, str | bytes]], deadline: float) -> Headers:
    """Return what a call says beside its messages.

    Args:
        metadata: Pairs of key and value.
        deadline: In seconds since the epoch; infinite if there is none.
    """
    headers = Headers()
    if deadline != math.inf:
        headers.seconds_left = deadline - time.time()
    for key, value in metadata:
        if key not in _KNOWN:
            continue
        if key == ALIAS_METADATA:
            headers.alias = str(value)
        elif key == STICKY_METADATA:
            headers.sticky_key = str(value)
        elif key == SHADOW_METADATA:
            headers.shadow = True
        elif key == STREAM_STATUS_METADATA:
            headers.strict_stream = value == "true"
        elif key == AUTHORIZATION:
            # Of two, both are lost: one was put there by somebody else.
            headers.authorization = "twice" if headers.authorization else value
        elif key == BEHALF:
            headers.behalf = "twice" if headers.behalf else value
        elif key == REQUEST_ID:
            headers.request_id = "" if headers.request_id else value
        elif key == TRACEPARENT:
            headers.traceparent = "" if headers.traceparent else value
        elif key == TRACESTATE:
            headers.tracestate = "" if headers.tracestate else value
    return headers
