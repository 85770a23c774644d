"""From rows of the registry to messages of the contract."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.retries import given_up
from pollard.services.models import registry
from pollard.services.models.aliases import alias_name
from pollard.services.models.downloads import Piece
from pollard.services.models.events import etag
from pollard.services.models.quorum import Quorum
from pollard.services.models.rollout_rows import rollout_name
from pollard.services.models.schema import Alias, Bundle, Event, Model, Revision, Rollout
from pollard.services.models.verify import Progress


def timestamp(microseconds: int) -> Timestamp:
    """Return a time of the registry."""
    message = Timestamp()
    message.FromMicroseconds(microseconds)
    return message


def model(row: Model, aliases: Sequence[Alias]) -> pb.Model:
    """Return a model with its aliases."""
    return pb.Model(
        name=registry.model_name(row.name),
        description=row.description or "",
        labels=row.labels or {},
        create_time=timestamp(row.create_time),
        update_time=timestamp(row.update_time),
        latest_revision=row.latest_revision,
        aliases=[alias(each) for each in aliases],
        etag=etag(row.etag),
        delete_time=None if row.delete_time is None else timestamp(row.delete_time),
    )


def revision(row: Revision, bundle: Bundle, aliases: Sequence[Alias]) -> pb.Revision:
    """Return a revision; ``aliases`` are those of its model."""
    return pb.Revision(
        name=registry.revision_name(row.model, row.number),
        revision=row.number,
        bundle_sha256=row.bundle_sha256,
        size_bytes=bundle.size_bytes,
        state=pb.Revision.State.ValueType(row.state),
        error=status_pb2.Status.FromString(row.error) if row.error else None,
        notes=row.notes,
        labels=row.labels or {},
        create_time=timestamp(row.create_time),
        creator=row.creator,
        aliases=[each.name for each in aliases if each.revision == row.number],
        etag=etag(row.etag),
        delete_time=None if row.delete_time is None else timestamp(row.delete_time),
        signature=_signature(bundle) if bundle.signer_key else None,
        origin=pb.Origin.FromString(row.origin) if row.origin else None,
    )


def _signature(bundle: Bundle) -> pb.BundleSignature:
    state = (
        pb.BundleSignature.STATE_TRUSTED
        if bundle.signer_trusted
        else pb.BundleSignature.STATE_UNKNOWN_KEY
    )
    return pb.BundleSignature(
        state=state,
        key_sha256=bundle.signer_key,
        create_time=timestamp(bundle.signed_time),
        creator=bundle.signed_by,
    )


def alias(row: Alias) -> pb.Alias:
    """Return an alias with the state of its switch."""
    quorum = Quorum.of(row.quorum)
    return pb.Alias(
        name=alias_name(row.model, row.name),
        revision=row.revision,
        pending_revision=row.pending_revision,
        previous_revision=row.previous_revision,
        state=pb.Alias.State.ValueType(row.state),
        error=status_pb2.Status.FromString(row.error) if row.error else None,
        failures=_failures(row.failures, ended=row.state == pb.Alias.STATE_FAILED),
        quorum=None if quorum is None else quorum.encode(),
        update_time=timestamp(row.update_time),
        etag=etag(row.etag),
    )


def piece(found: Piece) -> pb.DownloadBundleResponse:
    """Return a piece of a file, or where the file can be had."""
    message = pb.DownloadBundleResponse(
        path=found.path, offset=found.offset, data=found.data, total_bytes=found.total_bytes
    )
    if found.url is not None:
        message.url, message.sha256 = found.url.url, found.sha256
        message.expire_time.FromMicroseconds(int(found.url.expires * 1e6))
    return message


def verified(progress: Progress) -> pb.VerifyStoreResponse:
    """Return how far a verification is."""
    return pb.VerifyStoreResponse(
        checked_files=progress.checked_files,
        checked_bytes=progress.checked_bytes,
        total_files=progress.total_files,
        total_bytes=progress.total_bytes,
        damaged=[
            pb.DamagedFile(
                sha256=each.sha256,
                actual_sha256=each.actual,
                message=each.message,
                uses=each.uses,
            )
            for each in progress.damaged
        ],
    )


def rollout(row: Rollout) -> pb.Rollout:
    """Return a rollout."""
    hold = Duration()
    hold.FromMicroseconds(row.hold_us)
    quorum = Quorum.of(row.quorum)
    return pb.Rollout(
        name=rollout_name(row.model, row.number),
        alias=row.alias,
        revision=row.revision,
        base_revision=row.base_revision,
        steps=row.steps,
        hold=hold,
        gates=pb.RolloutGates(
            min_requests=row.min_requests,
            max_error_rate=row.max_error_rate,
            max_p99_ratio=row.max_p99_ratio,
            min_agreement=row.min_agreement,
        ),
        shadow_percent=row.shadow_ppm / 1e4,
        state=pb.Rollout.State.ValueType(row.state),
        step=row.step,
        error=status_pb2.Status.FromString(row.error) if row.error else None,
        create_time=timestamp(row.create_time),
        end_time=None if row.end_time is None else timestamp(row.end_time),
        etag=etag(row.etag),
        quorum=None if quorum is None else quorum.encode(),
        failures=_failures(row.failures, ended=row.end_time is not None),
    )


def _failures(stored: list[dict[str, str]], *, ended: bool = False) -> list[pb.ServerFailure]:
    found = [
        pb.ServerFailure(
            server_id=failure["server_id"],
            status=status_pb2.Status.FromString(bytes.fromhex(failure["status"])),
        )
        for failure in stored
    ]
    for failure in found if ended else ():
        failure.status.CopyFrom(given_up(failure.status))
    return found


def event(row: Event) -> pb.Event:
    """Return an event of the audit log."""
    return pb.Event(
        sequence=row.sequence,
        time=timestamp(row.time),
        actor=row.actor,
        action=row.action,
        resource=row.resource,
        detail=row.detail,
    )
