"""Tensors to the inference servers and back.

Round robin over the servers; one that is not there is passed over, and when
none is, the request waits a little and tries again: `ModelInfer` has no side
effects.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.tensors import FROM_NUMPY, NUMPY
from pollard.services.common.auth.errors import LIMIT_REASONS, LimitReached
from pollard.services.common.auth.own import OwnToken
from pollard.services.common.lifecycle import cancel, spawn
from pollard.services.common.shadows import SHADOW_METADATA
from pollard.services.common.status import RelayedError
from pollard.services.common.telemetry.record import outgoing
from pollard.services.common.telemetry.traces import within
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN, TlsFiles
from pollard.services.preprocess.errors import (
    InferenceFailed,
    InferenceUnavailable,
    RequestExpired,
    RevisionGone,
    ShadowDropped,
    TensorRefused,
)

_SPAN = "inference.GRPCInferenceService/ModelInfer"
_METHOD = f"/{_SPAN}"
_SPAN_ATTRIBUTES = {
    "rpc.system": "grpc",
    "rpc.service": "inference.GRPCInferenceService",
    "rpc.method": "ModelInfer",
}

_RAW_TAG = bytes(
    [pb.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number << 3 | 2]
)
"""What stands before a tensor in a request: its field, and that a length follows."""

_MARGIN_SECONDS = 0.01
"""Kept back from the deadline, for the way of the answer."""

_PATIENCE_SECONDS = 10.0
"""Longest search for a server that answers: time enough for one to be restarted."""

_FIRST_PAUSE_SECONDS = 0.02
_LONGEST_PAUSE_SECONDS = 0.5

_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    # The channel was closed under the call.
    grpc.StatusCode.CANCELLED,
    # Out of memory, on that server at least.
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_TOO_LATE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED)
_SHADOW = ((SHADOW_METADATA, "1"),)

_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)


@dataclass(frozen=True)
class Work:
    """One call of a model."""

    model: str
    revision: int
    input_name: str
    array: NDArray[np.generic]
    """The batch."""
    outputs: Sequence[str]
    """Names of the outputs wanted."""


class InferenceClient:
    """Channels to the inference servers, kept open."""

    def __init__(
        self,
        max_message_bytes: int = 64 * 1024**2,
        drain_seconds: float = 30.0,
        tls: TlsFiles = PLAIN,
        token: OwnToken | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            max_message_bytes: Largest message, both ways, in bytes.
            drain_seconds: Longest wait for calls in flight before a channel
                that is no longer needed is closed.
            tls: How the servers are reached.
            token: What is shown to them.
        """
        self._tls = tls
        self._token = token or OwnToken(None)
        self._options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            # A server whose machine has gone without a word keeps what it was sent for one timeout,
            # and what it had in hand for three: a ping comes after twice the time.
            ("grpc.keepalive_time_ms", 1_500),
            ("grpc.keepalive_timeout_ms", 1_500),
            # That is for the kernel. The answer to a ping a busy process may owe for seconds; gRPC
            # waits a minute for it unless told otherwise.
            ("grpc.http2.ping_timeout_ms", 5_000),
            # Otherwise only the first two are sent while nothing else is.
            ("grpc.http2.max_pings_without_data", 0),
            # A server that was restarted is found again soon.
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        ]
        self._drain_seconds = drain_seconds
        self._channels: dict[str, tuple[grpc.aio.Channel, Any]] = {}
        self._closing: set[asyncio.Task[Any]] = set()
        self._turn = 0

    def retain(self, endpoints: Collection[str]) -> None:
        """Close the channels to all other servers, once their calls are done."""
        for address in [address for address in self._channels if address not in endpoints]:
            channel, _ = self._channels.pop(address)
            spawn(self._closing, channel.close(self._drain_seconds), "close channel")

    async def close(self) -> None:
        """Close every channel."""
        await cancel(*self._closing)
        for channel, _ in self._channels.values():
            await channel.close()
        self._channels.clear()

    async def infer(
        self, work: Work, endpoints: Callable[[], Sequence[str]], deadline: float
    ) -> dict[str, NDArray[np.generic]]:
        """Run a model on one of the servers.

        Args:
            work: What to run.
            endpoints: Gives the gRPC targets; asked again before each round.
            deadline: When the answer must be there, by the loop's clock.

        Returns:
            The outputs by name.

        Raises:
            RevisionGone: none of the servers has the revision.
            InferenceUnavailable: no server could be reached in time.
            RequestExpired: the deadline passed first.
            TensorRefused: the server says that the tensor does not fit.
            LimitReached: the client for whom this is uses as much as it may.
            InferenceFailed: the server failed, or its answer makes no sense.
        """
        request = _encode(work)
        clock = asyncio.get_running_loop().time
        last_call = deadline - _MARGIN_SECONDS
        patient_until = min(last_call, clock() + _PATIENCE_SECONDS)
        pause = _FIRST_PAUSE_SECONDS
        words = ""
        while True:
            known = endpoints()
            if not known:
                raise InferenceUnavailable(
                    "no inference server is known; start one, or wait until it has joined"
                )
            self._turn += 1
            gone = 0
            for step in range(len(known)):
                if words and clock() >= last_call:
                    # What the servers said tells more than that the time is over.
                    raise _unavailable(work, words)
                address = known[(self._turn + step) % len(known)]
                try:
                    return _decode(work, await self._call(address, request, deadline))
                except grpc.aio.AioRpcError as error:
                    if error.code() == grpc.StatusCode.NOT_FOUND:
                        gone += 1
                    elif error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and (
                        limited := _limit_of(error)
                    ):
                        # The client's own; another server would only let it have more.
                        raise limited from None
                    elif error.code() in _PASSING:
                        words = f"{address}: {error.details()}"
                    else:
                        raise _translated(work, address, error) from error
            if gone == len(known):
                raise RevisionGone
            pause_now = pause * random.uniform(0.5, 1.5)
            if clock() + pause_now >= patient_until:
                raise _unavailable(work, words)
            await asyncio.sleep(pause_now)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    async def infer_shadow(
        self, work: Work, endpoints: Sequence[str], seconds: float
    ) -> dict[str, NDArray[np.generic]]:
        """Run a copy of a request on one server, once, if it has an idle worker.

        Raises:
            ShadowDropped: it has not, cannot be reached, or has not the revision.
            TensorRefused: the server says that the tensor does not fit.
            InferenceFailed: the server failed, or its answer makes no sense.
        """
        if not endpoints:
            raise ShadowDropped("no inference server is known")
        address = random.choice(endpoints)
        try:
            with within(_SPAN, "client", _SPAN_ATTRIBUTES):
                answer = await self._channel(address)(
                    _encode(work),
                    timeout=seconds,
                    metadata=(*self._token.on_behalf(), *_SHADOW, *outgoing()),
                )
        except grpc.aio.AioRpcError as error:
            if error.code() in (*_PASSING, *_TOO_LATE):
                raise ShadowDropped(f"{address}: {error.details()}") from error
            raise _translated(work, address, error) from error
        return _decode(work, answer)

    async def _call(self, address: str, request: bytes, deadline: float) -> bytes:
        left = deadline - asyncio.get_running_loop().time() - _MARGIN_SECONDS
        if left <= 0:
            raise RequestExpired("no time is left to run the model; allow the request more")
        with within(_SPAN, "client", _SPAN_ATTRIBUTES):
            answer: bytes = await self._channel(address)(
                request, timeout=left, metadata=(*self._token.on_behalf(), *outgoing())
            )
            return answer

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            channel = open_channel(address, self._tls, self._options)
            # No serialisers: the same bytes may go to several servers.
            self._channels[address] = (channel, channel.unary_unary(_METHOD))
        return self._channels[address][1]


def _limit_of(error: grpc.aio.AioRpcError) -> LimitReached | None:
    """Return the limit that a client has reached; None if the server itself has no room."""
    outcome = RelayedError.of(error).outcome
    if outcome.reason not in LIMIT_REASONS:
        return None
    metadata = {key: value for key, value in outcome.metadata.items() if key.isidentifier()}
    return LimitReached(
        outcome.message,
        reason=outcome.reason,
        retry_seconds=outcome.retry_seconds,
        **metadata,
    )


def _unavailable(work: Work, words: str) -> InferenceUnavailable:
    return InferenceUnavailable(
        f"no inference server could run revision {work.revision} of model {work.model!r} now; "
        f"the last one said: {words}",
        model=work.model,
        revision=work.revision,
        details=words,
    )


def _encode(work: Work) -> bytes:
    request = pb.ModelInferRequest(model_name=work.model, model_version=str(work.revision))
    request.inputs.add(
        name=work.input_name, datatype=FROM_NUMPY[work.array.dtype], shape=work.array.shape
    )
    for name in work.outputs:
        request.outputs.add(name=name)
    # The tensor is written after the rest: through the message it would be copied three times.
    tensor = np.ascontiguousarray(work.array).reshape(-1).view(np.uint8)
    return b"".join((request.SerializeToString(), _RAW_TAG, _varint(tensor.size), tensor.data))


def _varint(value: int) -> bytes:
    """Return a length as protobuf writes it."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)


def _decode(work: Work, answer: bytes) -> dict[str, NDArray[np.generic]]:
    try:
        response = pb.ModelInferResponse.FromString(answer)
        if response.model_version != str(work.revision):
            raise ValueError(f"it names version {response.model_version!r}")
        return {
            output.name: np.frombuffer(raw, NUMPY[output.datatype]).reshape(tuple(output.shape))
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }
    except Exception as error:
        raise InferenceFailed(
            f"the inference server's answer for revision {work.revision} of model "
            f"{work.model!r} makes no sense: {error}",
            model=work.model,
            revision=work.revision,
        ) from error


def _translated(work: Work, address: str, error: grpc.aio.AioRpcError) -> Exception:
    about = {"model": work.model, "revision": work.revision, "details": error.details()}
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestExpired("the time for the request ended while the model ran", **about)
    if error.code() in _REFUSALS:
        return TensorRefused(
            f"the inference server refuses the tensor of revision {work.revision} of model "
            f"{work.model!r}: {error.details()}",
            **about,
        )
    return InferenceFailed(
        f"the inference server {address} failed with {error.code().name}: {error.details()}",
        **about,
    )
