"""Messages of the contracts into the types of `types.py`, and arguments into messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np
from google.protobuf import duration_pb2, timestamp_pb2
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.client import types
from pollard.client._images import ImageLike, encoded
from pollard.client._names import (
    checked_alias,
    checked_model,
    checked_revision,
    last_part,
    revision_name,
    revision_parts,
)
from pollard.client._tensors import datatype_of, from_raw, to_raw
from pollard.client.errors import (
    InvalidAnswer,
    RequestFailed,
    image_failure,
    server_failure,
)
from pollard.inference import grpc_service_pb2
from pollard.models.v1 import fleet_service_pb2, model_service_pb2
from pollard.preprocess.v1 import preprocess_service_pb2

ALIAS_METADATA_KEY = "pollard-alias"
STICKY_METADATA_KEY = "pollard-sticky-key"


def enum_name(enum: Any, number: int, prefix: str) -> str:
    """Return the name of an enum's value, without its prefix.

    A value that a newer server has and this client does not know is "UNSPECIFIED".
    """
    value = enum.DESCRIPTOR.values_by_number.get(number)
    return "UNSPECIFIED" if value is None else str(value.name).removeprefix(prefix)


def sticky_metadata(key: str) -> str:
    """Return a sticky key as metadata can carry it, or raise ValueError when it cannot."""
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise ValueError(
            f"sticky key {key!r} is not valid here: metadata carries printable ASCII, without "
            "spaces at either end"
        )
    return key


# --- vision and preprocess ------------------------------------------------------------------------


def selector(
    model: str, revision: int | None, alias: str | None, sticky_key: str | None
) -> preprocess_service_pb2.ModelSelector:
    if revision is not None and alias is not None:
        raise ValueError("give a revision or an alias, not both")
    message = preprocess_service_pb2.ModelSelector(
        model=checked_model(model), sticky_key=sticky_key or ""
    )
    if revision is not None:
        message.revision = checked_revision(revision)
    if alias is not None:
        message.alias = checked_alias(alias)
    return message


def image(source: ImageLike) -> preprocess_service_pb2.Image:
    return preprocess_service_pb2.Image(content=encoded(source))


def transformed(response: preprocess_service_pb2.TransformResponse) -> types.Transformed:
    tensor = response.tensor
    return types.Transformed(
        model=response.model,
        revision=response.revision,
        name=tensor.name,
        tensor=from_raw(tensor.datatype, tensor.shape, tensor.content),
        geometries=tuple(
            types.Geometry(
                g.width, g.height, g.scale_x, g.scale_y, g.offset_x, g.offset_y, g.transposed
            )
            for g in response.geometries
        ),
    )


def transform_result(
    result: preprocess_service_pb2.TransformStreamResponse, address: str, method: str
) -> types.Transformed | RequestFailed:
    if result.HasField("error"):
        return failure(result.error, address, method)
    return transformed(result.response)


def failure(error: preprocess_service_pb2.StreamError, address: str, method: str) -> RequestFailed:
    return image_failure(error.code, error.message, error.reason, address=address, method=method)


# --- inference ------------------------------------------------------------------------------------


def infer_request(
    model: str,
    inputs: Mapping[str, NDArray[Any]],
    version: int | None,
    outputs: Sequence[str] | None,
    request_id: str,
) -> grpc_service_pb2.ModelInferRequest:
    request = grpc_service_pb2.ModelInferRequest(
        model_name=checked_model(model),
        model_version="" if version is None else str(checked_revision(version)),
        id=request_id,
    )
    for name, value in inputs.items():
        array = np.asarray(value)
        request.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        request.raw_input_contents.append(to_raw(array))
    for name in outputs or ():
        request.outputs.add(name=name)
    return request


def infer_result(response: grpc_service_pb2.ModelInferResponse) -> types.InferResult:
    if len(response.raw_output_contents) != len(response.outputs):
        raise InvalidAnswer(
            f"the server answered with {len(response.outputs)} outputs and the bytes of "
            f"{len(response.raw_output_contents)}; only raw outputs are understood"
        )
    return types.InferResult(
        model=response.model_name,
        version=int(response.model_version),
        id=response.id,
        outputs=MappingProxyType(
            {
                tensor.name: from_raw(tensor.datatype, tensor.shape, raw)
                for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
            }
        ),
    )


def model_metadata(response: grpc_service_pb2.ModelMetadataResponse) -> types.ModelMetadata:
    def infos(
        tensors: Sequence[grpc_service_pb2.ModelMetadataResponse.TensorMetadata],
    ) -> tuple[types.TensorInfo, ...]:
        return tuple(types.TensorInfo(t.name, t.datatype, tuple(t.shape)) for t in tensors)

    return types.ModelMetadata(
        name=response.name,
        versions=tuple(sorted(int(version) for version in response.versions)),
        platform=response.platform,
        inputs=infos(response.inputs),
        outputs=infos(response.outputs),
    )


# --- registry -------------------------------------------------------------------------------------


def alias(message: model_service_pb2.Alias) -> types.Alias:
    return types.Alias(
        model=message.name.split("/")[1] if message.name.count("/") >= 3 else "",
        name=last_part(message.name),
        revision=message.revision,
        pending_revision=message.pending_revision,
        previous_revision=message.previous_revision,
        state=enum_name(model_service_pb2.Alias.State, message.state, "STATE_"),
        error=message.error.message,
        failures=tuple(
            server_failure(failure.server_id, failure.status) for failure in message.failures
        ),
        update_time=_time(message, "update_time"),
        etag=message.etag,
    )


def model(message: model_service_pb2.Model) -> types.Model:
    return types.Model(
        name=last_part(message.name),
        description=message.description,
        labels=MappingProxyType(dict(message.labels)),
        latest_revision=message.latest_revision,
        aliases=tuple(alias(item) for item in message.aliases),
        create_time=_time(message, "create_time"),
        update_time=_time(message, "update_time"),
        etag=message.etag,
        delete_time=_time(message, "delete_time"),
    )


def revision(message: model_service_pb2.Revision) -> types.Revision:
    sizes = {file.path: file.size_bytes for file in message.manifest.files}
    return types.Revision(
        model=message.name.split("/")[1] if "/" in message.name else "",
        revision=message.revision,
        bundle_sha256=message.bundle_sha256,
        size_bytes=message.size_bytes,
        state=enum_name(model_service_pb2.Revision.State, message.state, "STATE_"),
        error=message.error.message,
        notes=message.notes,
        labels=MappingProxyType(dict(message.labels)),
        aliases=tuple(message.aliases),
        variants=tuple(_variant(variant, sizes) for variant in message.manifest.variants),
        creator=message.creator,
        create_time=_time(message, "create_time"),
        etag=message.etag,
        signature=_signature(message.signature) if message.HasField("signature") else None,
        origin=_origin(message.origin) if message.HasField("origin") else None,
        delete_time=_time(message, "delete_time"),
    )


def _signature(message: model_service_pb2.BundleSignature) -> types.BundleSignature:
    return types.BundleSignature(
        state=enum_name(model_service_pb2.BundleSignature.State, message.state, "STATE_"),
        key_sha256=message.key_sha256,
        create_time=_time(message, "create_time"),
        creator=message.creator,
    )


def _origin(message: model_service_pb2.Origin) -> types.Origin:
    model, revision = revision_parts(message.revision)
    return types.Origin(
        installation=message.installation,
        model=model,
        revision=revision,
        creator=message.creator,
        create_time=_time(message, "create_time"),
        notes=message.notes,
        labels=MappingProxyType(dict(message.labels)),
        aliases=tuple(message.aliases),
        origin=_origin(message.origin) if message.HasField("origin") else None,
    )


def origin_message(origin: types.Origin) -> model_service_pb2.Origin:
    message = model_service_pb2.Origin(
        installation=origin.installation,
        revision=revision_name(origin.model, origin.revision),
        creator=origin.creator,
        notes=origin.notes,
        labels=origin.labels,
        aliases=origin.aliases,
        origin=origin_message(origin.origin) if origin.origin is not None else None,
    )
    if origin.create_time is not None:
        message.create_time.FromDatetime(origin.create_time)
    return message


def _variant(message: bundle_pb2.Variant, sizes: Mapping[str, int]) -> types.Variant:
    measured = message.measurement
    accuracy = None
    if measured.HasField("accuracy") and measured.accuracy.samples:
        metric = measured.accuracy
        accuracy = types.Accuracy(
            metric.name, metric.value, metric.lower, metric.upper, metric.samples, metric.dataset
        )
    at_one = [entry.p50_us for entry in measured.latencies if entry.batch_size == 1]
    return types.Variant(
        name=message.name,
        target=message.target,
        # A bundle that nobody measured still says how long its files are.
        size_bytes=measured.size_bytes or sizes.get(message.model_file, 0),
        accuracy=accuracy,
        latency_p50_us=min(at_one, default=None),
    )


def server(message: fleet_service_pb2.Server) -> types.Server:
    hello = message.hello
    return types.Server(
        server_id=hello.server_id or last_part(message.name),
        kind=enum_name(fleet_service_pb2.ServerKind, hello.kind, "SERVER_KIND_"),
        address=hello.address,
        connected=message.connected,
        last_seen_time=_time(message, "last_seen_time"),
        acked_version=message.acked_version,
        last_refusal=message.last_nack.status.message,
        software_version=hello.software_version,
        targets=tuple(hello.capabilities.targets),
        revisions=tuple(
            types.ServerRevision(
                model=item.model,
                revision=item.revision,
                state=enum_name(fleet_service_pb2.RevisionState, item.state, "REVISION_STATE_"),
                variant=item.variant,
                error=item.error.message,
                succeeded=item.counters.succeeded,
                failed=item.counters.failed,
                tuning=_tuning(item.tuning) if item.HasField("tuning") else None,
            )
            for item in message.report.revisions
        ),
    )


def _tuning(message: fleet_service_pb2.Tuning) -> types.Tuning:
    return types.Tuning(
        workers=message.workers,
        threads=message.threads,
        joined_batch=message.joined_batch,
        set_by_hand=tuple(message.set_by_hand),
        aim=message.aim,
        measured_time=_time(message, "measured_time"),
        processor=message.processor,
        cores=message.cores,
        onnxruntime=message.onnxruntime,
        points=tuple(
            types.TuningPoint(
                threads=point.threads,
                callers=point.callers,
                batch_size=point.batch_size,
                rows_per_second=point.rows_per_second,
                latency_us=point.latency_us,
            )
            for point in message.points
        ),
    )


def damaged_file(message: model_service_pb2.DamagedFile) -> types.DamagedFile:
    return types.DamagedFile(
        sha256=message.sha256, message=message.message, uses=tuple(message.uses)
    )


def rollout(message: model_service_pb2.Rollout) -> types.Rollout:
    parts = message.name.split("/")
    return types.Rollout(
        model=parts[1] if len(parts) == 4 else "",
        number=int(parts[3]) if len(parts) == 4 and parts[3].isdecimal() else 0,
        alias=message.alias,
        revision=message.revision,
        base_revision=message.base_revision,
        steps=tuple(message.steps),
        step=message.step,
        hold_seconds=seconds(message.hold),
        min_requests=message.gates.min_requests,
        max_error_rate=message.gates.max_error_rate,
        max_p99_ratio=message.gates.max_p99_ratio,
        shadow_percent=message.shadow_percent,
        min_agreement=message.gates.min_agreement,
        state=enum_name(model_service_pb2.Rollout.State, message.state, "STATE_"),
        error=message.error.message,
        create_time=_time(message, "create_time"),
        end_time=_time(message, "end_time"),
        etag=message.etag,
        evidence=_evidence(message.evidence) if message.HasField("evidence") else None,
        failures=tuple(
            server_failure(failure.server_id, failure.status) for failure in message.failures
        ),
    )


def _evidence(message: model_service_pb2.RolloutEvidence) -> types.RolloutEvidence:
    shadow = message.shadow
    return types.RolloutEvidence(
        step=message.step,
        held_seconds=seconds(message.held),
        revision=_revision_evidence(message.revision),
        base=_revision_evidence(message.base),
        shadow=types.ShadowEvidence(
            compared=shadow.compared,
            items=shadow.items,
            agreed=shadow.agreed,
            dropped=shadow.dropped,
            failed=shadow.failed,
            distance_p50=shadow.distance_p50,
            distance_p99=shadow.distance_p99,
        )
        if message.HasField("shadow")
        else None,
        gates=tuple(
            types.GateEvidence(
                gate=gate.gate,
                state=enum_name(model_service_pb2.GateEvidence.State, gate.state, "STATE_"),
                words=gate.words,
            )
            for gate in message.gates
        ),
        waiting_for=tuple(message.waiting_for),
    )


def _revision_evidence(message: model_service_pb2.RevisionEvidence) -> types.RevisionEvidence:
    return types.RevisionEvidence(
        requests=message.requests,
        failed=message.failed,
        p50_ms=message.p50_ms,
        p99_ms=message.p99_ms,
        images=message.images,
        images_failed=message.images_failed,
    )


def event(message: model_service_pb2.Event) -> types.Event:
    return types.Event(
        sequence=message.sequence,
        time=_time(message, "time"),
        actor=message.actor,
        action=message.action,
        resource=message.resource,
        detail=message.detail,
    )


def seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _time(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    value: timestamp_pb2.Timestamp = getattr(message, field)
    return value.ToDatetime(tzinfo=UTC)
