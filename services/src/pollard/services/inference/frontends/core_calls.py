"""Calls that grpcio's core carries: each reads its messages, and sends its answers and status."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import structlog
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # a compiled module

from pollard.services.common.auth.callers import set_caller
from pollard.services.common.auth.usage import Lease
from pollard.services.common.status import describe
from pollard.services.common.telemetry.codes import CANCELLED, OK
from pollard.services.common.telemetry.record import CallRecord, set_call
from pollard.services.inference import protocol
from pollard.services.inference.errors import FeatureNotOffered, RequestInvalid
from pollard.services.inference.frontends.calls import Headers
from pollard.services.inference.frontends.framing import CallerGone
from pollard.services.inference.protocol import PreparedRequest
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.workers import Outcome, Work

if TYPE_CHECKING:
    from pollard.services.inference.frontends.core import CoreFront

_log = structlog.get_logger("pollard.inference.core")

_NO_FLAGS = 0

_WATCH_FROM_SECONDS = 0.02
"""Requests that will be answered sooner are not watched for their client's going: of each that is,
the core tells in an event of its own."""

_ending = threading.Lock()
"""A call ends once, though its answer and its client's going may come together."""


def _ignore(_: Any) -> None:
    """Take the completion of a batch whose outcome changes nothing."""


class InferCall:
    """A ModelInfer; a `Caller` of the engine. Its methods never wait."""

    __slots__ = (
        "_call",
        "_ended",
        "_front",
        "_headers",
        "_lease",
        "_prepared",
        "_record",
        "_revision",
        "_watched",
        "_work",
        "gone",
    )

    def __init__(
        self,
        front: CoreFront,
        call: Any,
        headers: Headers,
        record: CallRecord,
        lease: Lease | None = None,
    ) -> None:
        """Take a call that has just come."""
        self._front = front
        self._call = call
        self._headers = headers
        self._record = record
        self._lease = lease
        self._revision: LoadedRevision | None = None
        self._prepared: PreparedRequest | None = None
        self._work: Work | None = None
        self._ended = False
        self._watched = False
        self.gone = False

    def start(self) -> None:
        """Read the message, then go on."""
        self._call.start_server_batch(
            (cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message
        )

    def settle(self, work: Work, outcome: Outcome) -> None:
        """Send the answer or the error."""
        with _ending:
            if self._ended:
                return
            self._ended = True
        prepared, revision = self._prepared, self._revision
        assert prepared is not None  # noqa: S101 - else it were not run
        assert revision is not None  # noqa: S101
        try:
            if isinstance(outcome, Exception):
                revision.finish(work, outcome)
                self._fail(outcome)
                return
            try:
                data = prepared.answer(outcome).SerializeToString()
            except Exception as error:
                revision.finish(work, error)
                self._fail(error)
                return
            revision.finish(work, None, outcome)
            if work.span is not None and work.timing is not None:
                work.span.draw("answer", work.timing.split, time.perf_counter_ns())
            self._send(data)
        except Exception:
            # On a worker's thread, which must live on.
            _log.exception("an answer could not be sent")
        finally:
            self._let_go(prepared)

    def hand_over(self, settled: Sequence[tuple[Work, Outcome]]) -> None:
        """Send from the thread that has the answers: no other need be woken."""
        for work, outcome in settled:
            work.caller.settle(work, outcome)

    def _on_message(self, event: Any) -> None:
        data = event.batch_operations[0].message()
        if data is None:
            self._fail(RequestInvalid("the call ended without a request"))
            return
        headers, engine = self._headers, self._front.engine
        try:
            if self._lease is not None:
                self._lease.check_size(len(data))
            request, raw = protocol.unpack(data)
            revision = engine.enter(
                request.model_name, request.model_version, headers.alias, headers.sticky_key
            )
        except Exception as error:
            self._fail(error)
            return
        try:
            prepared = protocol.prepare(request, revision.info, self._front.calls.shared, raw)
        except Exception as error:
            revision.reject()
            revision.finish(None)
            self._fail(error)
            return
        self._revision, self._prepared = revision, prepared
        options = prepared.options
        span = self._record.span
        try:
            work = self._work = revision.work(
                prepared.feeds,
                prepared.specs,
                engine.deadline(headers.seconds_left),
                self,
                wait_seconds=options.wait_seconds,
                priority=options.priority,
            )
            work.who = headers.caller.key
            if span is not None and span.recorded:
                work.span = span
        except Exception as error:
            prepared.close()
            revision.finish(None)
            self._fail(error)
            return
        try:
            if revision.runs_inline(work):
                self._front.gather(revision, work)
                return
            if revision.wait_seconds() > _WATCH_FROM_SECONDS:
                self._watched = True
                self._call.start_server_batch(
                    (cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close
                )
            revision.submit(work)
        except Exception as error:
            self.settle(work, error)

    def _on_close(self, event: Any) -> None:
        if not event.batch_operations[0].cancelled():
            return
        self.gone = True
        with _ending:
            if self._ended:
                return
            self._ended = True
        self._record.end(CANCELLED)
        assert self._prepared is not None  # noqa: S101 - else it were not watched
        assert self._revision is not None  # noqa: S101
        self._revision.finish(self._work, asyncio.CancelledError())
        self._let_go(self._prepared)

    def _let_go(self, prepared: PreparedRequest) -> None:
        """Free the request now: the work names its caller, and a circle would keep the tensors
        until the garbage collector comes by."""
        prepared.close()
        self._prepared = self._work = None
        if self._lease is not None:
            self._lease.close()

    def _send(self, data: bytes) -> None:
        operations = [
            cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),
            cygrpc.SendMessageOperation(data, _NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(self._record.trailing, OK, b"", _NO_FLAGS),
        ]
        self._end(operations)
        self._record.end()

    def _fail(self, error: Exception) -> None:
        status, code = status_of(error, self._record)
        self._end([cygrpc.SendInitialMetadataOperation((), _NO_FLAGS), status])
        self._record.end(code)

    def _end(self, operations: list[Any]) -> None:
        if self._lease is not None:
            self._lease.close()
        if not self._watched:
            operations.append(cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS))
        self._call.start_server_batch(operations, _ignore)


class LoopCall:
    """Any other call, answered on the event loop."""

    def __init__(
        self,
        front: CoreFront,
        call: Any,
        headers: Headers,
        record: CallRecord,
        metadata: Iterable[tuple[str, str | bytes]],
        lease: Lease | None = None,
    ) -> None:
        """Take a call that has just come."""
        self._front = front
        self._call = call
        self._path = record.path
        self._record = record
        self._headers = headers
        self._metadata = metadata
        self._lease = lease
        self._task: asyncio.Task[None] | None = None
        self._started = False

    def start(self) -> None:
        """Answer it; on the event loop's thread."""
        self._task = self._front.loop.create_task(self._run())
        self._call.start_server_batch(
            (cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close
        )

    def _on_close(self, event: Any) -> None:
        if event.batch_operations[0].cancelled() and self._task is not None:
            self._front.loop.call_soon_threadsafe(self._task.cancel)

    async def _run(self) -> None:
        set_call(self._record)
        set_caller(self._headers.caller)
        calls, code = self._front.calls, OK
        try:
            if self._path in calls.streams:
                async with calls.gate.open_calls.lasting(self._headers.caller):
                    await self._answer()
            else:
                await self._answer()
        except (CallerGone, asyncio.CancelledError):
            # The client has gone, and nobody waits for an answer.
            code = CANCELLED
        except Exception as error:
            status, code = status_of(error, self._record)
            with contextlib.suppress(CallerGone, asyncio.CancelledError):
                self._leave()
                await self._batch(*self._beginning(), status)
        finally:
            self._leave()
            self._record.end(code)

    def _leave(self) -> None:
        """Give the caller's place back, before it learns that the call has ended."""
        if self._lease is not None:
            self._lease.close()

    async def _answer(self) -> None:
        calls = self._front.calls
        restriction = calls.restriction(self._path)
        if restriction is not None:
            restriction.check(self._metadata)
        unary = calls.unary.get(self._path)
        stream = calls.streams.get(self._path)
        if unary is not None:
            data = await self._receive()
            if data is None:
                raise RequestInvalid("the call ended without a request")
            if self._lease is not None:
                self._lease.check_size(len(data))
            answer = await unary(data, self._headers)
            self._leave()
            await self._batch(
                *self._beginning(),
                cygrpc.SendMessageOperation(answer, _NO_FLAGS),
                self._ending_well(),
            )
        elif stream is not None:
            messages = self._messages()
            if self._lease is not None:
                messages = calls.metered(self._path, messages, self._lease)
            answers = stream(messages, self._headers)
            async with contextlib.aclosing(answers):  # type: ignore[type-var]  # all generators
                async for answer in answers:
                    await self._batch(
                        *self._beginning(), cygrpc.SendMessageOperation(answer, _NO_FLAGS)
                    )
            self._leave()
            await self._batch(*self._beginning(), self._ending_well())
        else:
            raise FeatureNotOffered(f"there is no method {self._path}")

    def _ending_well(self) -> Any:
        return cygrpc.SendStatusFromServerOperation(self._record.trailing, OK, b"", _NO_FLAGS)

    def _beginning(self) -> list[Any]:
        if self._started:
            return []
        self._started = True
        return [cygrpc.SendInitialMetadataOperation((), _NO_FLAGS)]

    async def _messages(self) -> AsyncIterator[bytes]:
        while (data := await self._receive()) is not None:
            yield data

    async def _receive(self) -> bytes | None:
        (received,) = await self._batch(cygrpc.ReceiveMessageOperation(_NO_FLAGS))
        data: bytes | None = received.message()
        return data

    async def _batch(self, *operations: Any) -> Sequence[Any]:
        """Have the core do something, wait until it is done, and return the operations.

        Raises:
            CallerGone: the call is over.
        """
        loop = self._front.loop
        done: asyncio.Future[Sequence[Any] | None] = loop.create_future()

        def on_done(event: Any) -> None:
            # Not the event itself, which names this function: a circle would keep the messages
            # until the garbage collector comes by.
            outcome = event.batch_operations if event.success else None
            loop.call_soon_threadsafe(_resolve, done, outcome)

        if self._call.start_server_batch(operations, on_done):
            raise CallerGone
        outcome = await done
        if outcome is None:
            raise CallerGone
        return outcome


def status_of(error: BaseException, record: CallRecord) -> tuple[Any, int]:
    """Return the operation that ends a call with an error, and the status's number."""
    outcome = describe(error, record)
    record.failed(outcome.reason, outcome.message)
    code: int = outcome.code.value[0]
    operation = cygrpc.SendStatusFromServerOperation(
        (
            *record.trailing,
            ("grpc-status-details-bin", outcome.to_proto().SerializeToString()),
        ),
        code,
        outcome.message.encode(),
        _NO_FLAGS,
    )
    return operation, code


def refuse(call: Any, error: Exception, record: CallRecord) -> None:
    """End a call of which nothing has been read."""
    status, code = status_of(error, record)
    record.end(code)
    call.start_server_batch(
        (
            cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),
            status,
            cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
        ),
        _ignore,
    )


def _resolve(done: asyncio.Future[Any], outcome: Sequence[Any] | None) -> None:
    if not done.done():
        done.set_result(outcome)
