"""Inference requests of the Open Inference Protocol over the engine, from bytes to bytes.

Nothing here knows gRPC, so that any front end that carries requests and answers as bytes can use
it. The statuses and wordings are those that the protocol's clients know from Triton. The other
methods of the protocol are in `methods`, streams in `streaming`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.sessions import Array, TensorInfo
from pollard.services.common.telemetry.traces import within
from pollard.services.inference.classification import top_classes
from pollard.services.inference.engine import Engine
from pollard.services.inference.errors import RegionFailed, RequestInvalid
from pollard.services.inference.parameters import Place, RequestOptions, request_options
from pollard.services.inference.revision import RevisionInfo
from pollard.services.inference.shared_memory import SharedMemory, Span
from pollard.services.inference.tensors import (
    RawTensor,
    WantedOutput,
    decode_inputs,
    select_outputs,
    to_raw,
)
from pollard.services.inference.wire import take_out_tensors
from pollard.services.inference.workers import Outputs

_NO_SHARED_MEMORY = SharedMemory(enabled=False)


async def model_infer(
    engine: Engine,
    data: bytes,
    *,
    alias: str = "",
    sticky_key: str = "",
    seconds_left: float | None = None,
    shared: SharedMemory = _NO_SHARED_MEMORY,
    shadow: bool = False,
) -> bytes:
    """Answer a serialised ModelInferRequest with a serialised ModelInferResponse.

    Args:
        engine: Where to run it.
        data: The request.
        alias: Alias to follow if the request names no version; empty means "production".
        sticky_key: Requests with the same key get the same revision of a split alias.
        seconds_left: Time until the caller's deadline; None if it has none.
        shared: Regions in which tensors may lie.
        shadow: Whether the request is a copy, to be run at low priority or not at all.

    Raises:
        ServiceError: as in `errors`; the engine is as it was.
    """
    request, raw = unpack(data)
    response, _ = await answer(
        engine,
        request,
        raw,
        alias=alias,
        sticky_key=sticky_key,
        seconds_left=seconds_left,
        shared=shared,
        shadow=shadow,
    )
    return response.SerializeToString()


def parse(data: bytes) -> pb.ModelInferRequest:
    """Return the request that `data` is.

    Raises:
        RequestInvalid: it is none.
    """
    try:
        return pb.ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise RequestInvalid(f"the request is not a ModelInferRequest: {error}") from None


def unpack(data: bytes) -> tuple[pb.ModelInferRequest, Sequence[RawTensor] | None]:
    """Return the request that `data` is, and its raw contents if they were taken out of it.

    They are parts of `data`, and keep it.

    Raises:
        RequestInvalid: it is none.
    """
    apart = take_out_tensors(data)
    if apart is None:
        return parse(data), None
    rest, raw = apart
    return parse(rest), raw


async def answer(
    engine: Engine,
    request: pb.ModelInferRequest,
    raw: Sequence[RawTensor] | None = None,
    *,
    alias: str,
    sticky_key: str,
    seconds_left: float | None,
    shared: SharedMemory,
    shadow: bool = False,
) -> tuple[pb.ModelInferResponse, RequestOptions]:
    """Run a request and return its answer and its options; see `model_infer`."""
    revision = engine.resolve(request.model_name, request.model_version, alias, sticky_key)
    try:
        prepared = prepare(request, revision.info, shared, raw)
    except Exception:
        if not shadow:
            revision.reject()
        raise
    options = prepared.options
    try:
        if shadow:
            with within("shadow"):
                outputs = await engine.infer_shadow(revision, prepared.feeds, prepared.specs)
            return prepared.answer(outputs), options
        outputs = await engine.infer(
            revision,
            prepared.feeds,
            prepared.specs,
            seconds_left,
            wait_seconds=options.wait_seconds,
            priority=options.priority,
        )
        with within("answer"):
            return prepared.answer(outputs), options
    finally:
        prepared.close()


@dataclass(slots=True)
class PreparedRequest:
    """A request that was checked against its revision. To be closed."""

    request_id: str
    info: RevisionInfo
    options: RequestOptions
    wanted: Sequence[WantedOutput]
    feeds: dict[str, Array]
    regions: Mapping[str, Span]
    """Where in shared memory outputs go, by output."""
    _held: contextlib.ExitStack | None

    @property
    def specs(self) -> list[TensorInfo]:
        """The outputs wanted."""
        return [output.spec for output in self.wanted]

    def answer(self, outputs: Outputs) -> pb.ModelInferResponse:
        """Return the answer; outputs that go into shared memory are written there.

        Raises:
            ServiceError: an output does not fit where the client wants it.
        """
        return _encode(self.request_id, self.info, self.wanted, outputs, self.regions)

    def close(self) -> None:
        """Let go of the regions."""
        if self._held is not None:
            self._held.close()


def prepare(
    request: pb.ModelInferRequest,
    info: RevisionInfo,
    shared: SharedMemory,
    raw: Sequence[RawTensor] | None = None,
) -> PreparedRequest:
    """Check a request against a revision and read its inputs.

    Args:
        request: The request.
        info: Of the revision.
        shared: Regions in which tensors may lie.
        raw: The request's raw contents, if they were taken out of it.

    Raises:
        ServiceError: as in `errors`.
    """
    held: contextlib.ExitStack | None = None
    regions: dict[str, Span] = {}

    def read_shared(place: Place) -> bytes:
        with shared.use(place.region) as region:
            return region.read(place.offset, place.byte_size)

    try:
        options = request_options(request)
        wanted = select_outputs(request, info.outputs)
        for spec, _, place in wanted:
            if place is not None:
                # Open until the output is written, also if it is unregistered meanwhile.
                held = held or contextlib.ExitStack()
                region = held.enter_context(shared.use(place.region))
                region.check(place.offset, place.byte_size)
                regions[spec.name] = region
        feeds = decode_inputs(request, info.inputs, info.max_batch_size, read_shared, raw)
    except BaseException:
        if held is not None:
            held.close()
        raise
    return PreparedRequest(request.id, info, options, wanted, feeds, regions, held)


def _encode(
    request_id: str,
    info: RevisionInfo,
    wanted: Sequence[WantedOutput],
    outputs: Outputs,
    regions: Mapping[str, Span],
) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(
        model_name=info.model, model_version=str(info.revision), id=request_id
    )
    for spec, classes, place in wanted:
        array, datatype = outputs[spec.name], spec.datatype
        if classes:
            array = top_classes(
                array,
                datatype,
                classes,
                info.labels.get(spec.name, ()),
                batched=info.batches,
                output=spec.name,
            )
            datatype = "BYTES"
        tensor = response.outputs.add(name=spec.name, datatype=datatype, shape=array.shape)
        data = to_raw(array)
        if place is None:
            response.raw_output_contents.append(data)
            continue
        if len(data) > place.byte_size:
            raise RegionFailed(
                f"shared memory size specified with the request for output '{spec.name}' "
                f"({place.byte_size} bytes) should be at least {len(data)} bytes to hold the "
                "results",
                output=spec.name,
                needed_bytes=len(data),
            )
        regions[spec.name].write(place.offset, data)
        tensor.parameters["shared_memory_region"].string_param = place.region
        tensor.parameters["shared_memory_byte_size"].int64_param = len(data)
        if place.offset:
            tensor.parameters["shared_memory_offset"].int64_param = place.offset
        # Clients look for an output's bytes at its place in the list.
        response.raw_output_contents.append(b"")
    return response
