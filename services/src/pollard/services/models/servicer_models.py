"""ModelService over gRPC: decode, call the domain, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.runtime.bundle import parse_manifest
from pollard.services.common.auth import current_caller
from pollard.services.common.errors import InvalidRequest
from pollard.services.models import (
    aliases,
    bundle_rows,
    downloads,
    encode,
    events,
    names,
    registry,
    verify,
)
from pollard.services.models.blobs import Blobs
from pollard.services.models.fleet import Fleet
from pollard.services.models.quorum import Quorum
from pollard.services.models.quotas import Quotas
from pollard.services.models.schema import Model, Revision
from pollard.services.models.servicer_rollouts import Context, RolloutMethods
from pollard.services.models.servicer_rollouts import actor as actor_of
from pollard.services.models.signatures import SignaturePolicy
from pollard.services.models.store import Store
from pollard.services.models.uploads import UploadRequest, Uploads
from pollard.services.models.watch import EventFeed

MAX_ORIGINS = 16
"""How often a revision may have been copied from one installation to the next."""
MAX_ORIGIN_BYTES = 256 * 1024


class ModelServicer(RolloutMethods):
    """Hands requests to registry, uploads and aliases."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        uploads: Uploads,
        fleet: Fleet,
        feed: EventFeed,
        policy: SignaturePolicy,
    ) -> None:
        super().__init__(store, fleet, policy)
        self._blobs = blobs
        self._uploads = uploads
        self._feed = feed
        self._quotas = Quotas(store)
        self._small = downloads.SmallFiles()
        self.pace = downloads.Pace()

    # Bundles

    async def UploadBundle(
        self, request_iterator: AsyncIterator[pb.UploadBundleRequest], context: Context
    ) -> pb.UploadBundleResponse:
        """Store a bundle."""
        incoming = aiter(request_iterator)
        first = await anext(incoming, None)
        if first is None or first.WhichOneof("message") != "header":
            raise InvalidRequest(
                "the first message of an upload is its header", reason="HEADER_MISSING"
            )
        request = _decode_header(first.header)
        async with self._quotas.room_for(current_caller(), request.total_bytes):
            uploaded = await self._uploads.receive(request, _chunks(incoming), actor_of(context))
        self._fleet.poke()
        found = await self._revision(uploaded.model, uploaded.revision)
        return pb.UploadBundleResponse(
            revision=found, existed=uploaded.existed, warnings=uploaded.warnings
        )

    async def GetUpload(
        self, request: pb.GetUploadRequest, context: Context
    ) -> pb.GetUploadResponse:
        """Tell how far an upload is."""
        model = names.parse_model(request.parent, "parent")
        upload_id = names.check_uuid(request.upload_id, "upload_id")
        committed = await self._uploads.committed_bytes(model, upload_id)
        return pb.GetUploadResponse(committed_bytes=committed)

    async def DownloadBundle(
        self, request: pb.DownloadBundleRequest, context: Context
    ) -> AsyncIterator[pb.DownloadBundleResponse]:
        """Send the files of a bundle."""
        kind = request.WhichOneof("source")
        source: tuple[str, int | str] | str
        if kind == "name":
            source = names.parse_target(request.name)
        elif kind == "bundle_sha256":
            source = names.check_sha256(request.bundle_sha256, "bundle_sha256")
        else:
            raise InvalidRequest("name a revision, an alias or a bundle", reason="SOURCE_MISSING")
        files = await downloads.find_files(self._store, source, request.paths)
        urls = await downloads.find_urls(self._blobs, files) if request.accept_urls else {}
        # Servers come many at a time. What lies on this machine's disk is in its memory already.
        small = self._small if request.accept_urls and self._blobs.shared else None
        async for piece in downloads.read_files(self._blobs, files, urls, small, self.pace):
            yield encode.piece(piece)

    async def VerifyStore(
        self, request: pb.VerifyStoreRequest, context: Context
    ) -> AsyncIterator[pb.VerifyStoreResponse]:
        """Read everything again and tell what is damaged."""
        model = names.parse_model(request.parent, "parent") if request.parent else ""
        async for progress in verify.verify(self._store, self._blobs, model):
            yield encode.verified(progress)

    # Models

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """Get one model, also one that is deleted."""
        model = names.parse_model(request.name)
        found = await self._store.read(
            lambda session: _model(session, registry.find_model(session, model, deleted=True))
        )
        return pb.GetModelResponse(model=found)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """List models."""

        def work(session: Session) -> pb.ListModelsResponse:
            found, token = registry.list_models(
                session,
                page_size=request.page_size,
                page_token=request.page_token,
                show_deleted=request.show_deleted,
                order_by=request.order_by,
                filter_text=request.filter,
            )
            by_model = registry.aliases_of(session, [row.name for row in found])
            return pb.ListModelsResponse(
                models=[encode.model(row, by_model[row.name]) for row in found],
                next_page_token=token,
            )

        return await self._store.read(work)

    async def UpdateModel(
        self, request: pb.UpdateModelRequest, context: Context
    ) -> pb.UpdateModelResponse:
        """Change description and labels."""
        model = names.parse_model(request.model.name, "model.name")
        masked = _masked(request.update_mask, request.model, ("description", "labels"))
        actor = actor_of(context)

        def work(session: Session) -> pb.UpdateModelResponse:
            row = registry.update_model(
                session,
                model,
                description=request.model.description if "description" in masked else None,
                labels=dict(request.model.labels) if "labels" in masked else None,
                etag=request.model.etag,
                actor=actor,
            )
            return pb.UpdateModelResponse(model=_model(session, row))

        return await self._change("UpdateModel", request, work, pb.UpdateModelResponse)

    async def DeleteModel(
        self, request: pb.DeleteModelRequest, context: Context
    ) -> pb.DeleteModelResponse:
        """Delete a model with its revisions."""
        model = names.parse_model(request.name)
        actor = actor_of(context)

        def work(session: Session) -> pb.DeleteModelResponse:
            row = registry.find_model(session, model)
            events.check_etag(request.etag, row.etag, request.name)
            if request.force:
                for alias in registry.aliases_of(session, [model])[model]:
                    aliases.delete_alias(session, model, alias.name, etag="", actor=actor)
                session.flush()
            row = registry.delete_model(session, model, etag="", actor=actor)
            return pb.DeleteModelResponse(model=_model(session, row))

        return await self._change("DeleteModel", request, work, pb.DeleteModelResponse)

    async def UndeleteModel(
        self, request: pb.UndeleteModelRequest, context: Context
    ) -> pb.UndeleteModelResponse:
        """Bring a model back."""
        model = names.parse_model(request.name)
        actor = actor_of(context)

        def work(session: Session) -> pb.UndeleteModelResponse:
            row = registry.undelete_model(session, model, actor=actor)
            return pb.UndeleteModelResponse(model=_model(session, row))

        return await self._change("UndeleteModel", request, work, pb.UndeleteModelResponse)

    # Revisions

    async def GetRevision(
        self, request: pb.GetRevisionRequest, context: Context
    ) -> pb.GetRevisionResponse:
        """Get one revision with its manifest, also one that is deleted."""
        model, target = names.parse_target(request.name)
        return pb.GetRevisionResponse(revision=await self._revision(model, target))

    async def ListRevisions(
        self, request: pb.ListRevisionsRequest, context: Context
    ) -> pb.ListRevisionsResponse:
        """List revisions, newest first."""
        model = names.parse_model(request.parent, "parent")

        def work(session: Session) -> pb.ListRevisionsResponse:
            found, token = registry.list_revisions(
                session,
                model,
                page_size=request.page_size,
                page_token=request.page_token,
                show_deleted=request.show_deleted,
                order_by=request.order_by,
                filter_text=request.filter,
            )
            return pb.ListRevisionsResponse(
                revisions=_encode_revisions(session, model, found), next_page_token=token
            )

        return await self._store.read(work)

    async def UpdateRevision(
        self, request: pb.UpdateRevisionRequest, context: Context
    ) -> pb.UpdateRevisionResponse:
        """Change notes and labels."""
        model, number = names.parse_revision(request.revision.name, "revision.name")
        masked = _masked(request.update_mask, request.revision, ("notes", "labels"))
        actor = actor_of(context)

        def work(session: Session) -> pb.UpdateRevisionResponse:
            row = registry.update_revision(
                session,
                model,
                number,
                notes=request.revision.notes if "notes" in masked else None,
                labels=dict(request.revision.labels) if "labels" in masked else None,
                etag=request.revision.etag,
                actor=actor,
            )
            return pb.UpdateRevisionResponse(revision=_encode_revisions(session, model, [row])[0])

        return await self._change("UpdateRevision", request, work, pb.UpdateRevisionResponse)

    async def DeleteRevision(
        self, request: pb.DeleteRevisionRequest, context: Context
    ) -> pb.DeleteRevisionResponse:
        """Delete a revision."""
        model, number = names.parse_revision(request.name)
        actor = actor_of(context)

        def work(session: Session) -> pb.DeleteRevisionResponse:
            row = registry.delete_revision(session, model, number, etag=request.etag, actor=actor)
            return pb.DeleteRevisionResponse(revision=_encode_revisions(session, model, [row])[0])

        return await self._change("DeleteRevision", request, work, pb.DeleteRevisionResponse)

    async def UndeleteRevision(
        self, request: pb.UndeleteRevisionRequest, context: Context
    ) -> pb.UndeleteRevisionResponse:
        """Bring a revision back."""
        model, number = names.parse_revision(request.name)
        actor = actor_of(context)

        def work(session: Session) -> pb.UndeleteRevisionResponse:
            row = registry.undelete_revision(session, model, number, actor=actor)
            return pb.UndeleteRevisionResponse(revision=_encode_revisions(session, model, [row])[0])

        return await self._change("UndeleteRevision", request, work, pb.UndeleteRevisionResponse)

    # Aliases

    async def GetAlias(self, request: pb.GetAliasRequest, context: Context) -> pb.GetAliasResponse:
        """Get one alias."""
        model, alias = names.parse_alias(request.name)
        found = await self._store.read(
            lambda session: encode.alias(aliases.find_alias(session, model, alias))
        )
        return pb.GetAliasResponse(alias=found)

    async def ListAliases(
        self, request: pb.ListAliasesRequest, context: Context
    ) -> pb.ListAliasesResponse:
        """List the aliases of a model."""
        model = names.parse_model(request.parent, "parent")

        def work(session: Session) -> pb.ListAliasesResponse:
            found, token = aliases.list_aliases(
                session, model, page_size=request.page_size, page_token=request.page_token
            )
            return pb.ListAliasesResponse(
                aliases=[encode.alias(row) for row in found], next_page_token=token
            )

        return await self._store.read(work)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> pb.SetAliasResponse:
        """Store where an alias should point; the switch goes on by itself."""
        model, alias = names.parse_alias(request.name)
        number = names.check_number(str(request.revision), "revision")
        quorum = Quorum.decode(request.quorum) if request.HasField("quorum") else None
        actor = actor_of(context)

        def work(session: Session) -> pb.SetAliasResponse:
            self._policy.check_served(session, model, number)
            row = aliases.set_alias(
                session,
                model,
                alias,
                number,
                etag=request.etag,
                allow_signature_change=request.allow_signature_change,
                actor=actor,
                quorum=quorum,
            )
            return pb.SetAliasResponse(alias=encode.alias(row))

        return await self._change("SetAlias", request, work, pb.SetAliasResponse)

    async def RollbackAlias(
        self, request: pb.RollbackAliasRequest, context: Context
    ) -> pb.RollbackAliasResponse:
        """Store that an alias should go back."""
        model, alias = names.parse_alias(request.name)
        quorum = Quorum.decode(request.quorum) if request.HasField("quorum") else None
        actor = actor_of(context)

        def work(session: Session) -> pb.RollbackAliasResponse:
            row = aliases.roll_back(
                session, model, alias, etag=request.etag, actor=actor, quorum=quorum
            )
            return pb.RollbackAliasResponse(alias=encode.alias(row))

        return await self._change("RollbackAlias", request, work, pb.RollbackAliasResponse)

    async def DeleteAlias(
        self, request: pb.DeleteAliasRequest, context: Context
    ) -> pb.DeleteAliasResponse:
        """Remove an alias."""
        model, alias = names.parse_alias(request.name)
        actor = actor_of(context)

        def work(session: Session) -> pb.DeleteAliasResponse:
            aliases.delete_alias(session, model, alias, etag=request.etag, actor=actor)
            return pb.DeleteAliasResponse()

        return await self._change("DeleteAlias", request, work, pb.DeleteAliasResponse)

    # Events

    async def ListEvents(
        self, request: pb.ListEventsRequest, context: Context
    ) -> pb.ListEventsResponse:
        """List the audit log, newest first."""
        model = names.parse_model(request.model, "model") if request.model else ""
        found, token = await self._store.read(
            lambda session: events.list_events(
                session, page_size=request.page_size, page_token=request.page_token, model=model
            )
        )
        return pb.ListEventsResponse(
            events=[encode.event(row) for row in found], next_page_token=token
        )

    async def WatchEvents(
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        """Send changes as they happen."""
        if request.start_sequence < 0:
            raise InvalidRequest(
                f"start_sequence {request.start_sequence} is negative; the first event is 1, and 0 "
                "means from now on",
                reason="SEQUENCE_INVALID",
                start_sequence=request.start_sequence,
            )
        model = names.parse_model(request.model, "model") if request.model else ""
        async for step in self._feed.watch(request.start_sequence, model):
            yield pb.WatchEventsResponse(event=step.event, sequence=step.sequence)

    # Shared

    async def _revision(self, model: str, target: int | str) -> pb.Revision:
        """Return a revision with its manifest."""

        def work(session: Session) -> pb.Revision:
            row = registry.resolve(session, model, target, deleted=True)
            return _encode_revisions(session, model, [row])[0]

        found = await self._store.read(work)
        raw = await asyncio.to_thread(self._blobs.read, found.bundle_sha256)
        found.manifest.CopyFrom(await asyncio.to_thread(parse_manifest, raw))
        return found


def _decode_header(header: pb.UploadHeader) -> UploadRequest:
    sha256, bundle_sha256 = header.sha256, header.bundle_sha256
    if sha256 or not bundle_sha256:
        names.check_sha256(sha256, "sha256")
    if bundle_sha256:
        names.check_sha256(bundle_sha256, "bundle_sha256")
    return UploadRequest(
        model=names.parse_model(header.parent, "parent"),
        upload_id=names.check_uuid(header.upload_id, "upload_id"),
        write_offset=header.write_offset,
        total_bytes=header.total_bytes,
        sha256=sha256,
        bundle_sha256=bundle_sha256,
        notes=names.check_text(header.notes, "notes"),
        labels=names.check_labels(header.labels),
        alias=names.check_alias_id(header.alias) if header.alias else "",
        allow_signature_change=header.allow_signature_change,
        origin=_check_origin(header.origin) if header.HasField("origin") else b"",
    )


def _check_origin(origin: pb.Origin) -> bytes:
    """Return an origin as it is kept.

    Raises:
        InvalidRequest: it says something impossible, or too much.
    """
    raw = origin.SerializeToString(deterministic=True)
    depth, where = 0, "origin"
    current: pb.Origin | None = origin
    while current is not None:
        depth += 1
        if depth > MAX_ORIGINS or len(raw) > MAX_ORIGIN_BYTES:
            raise InvalidRequest(
                f"origin is more than {MAX_ORIGINS} copies deep or longer than "
                f"{MAX_ORIGIN_BYTES} bytes",
                reason="ORIGIN_TOO_LONG",
            )
        if not 0 < len(current.installation) <= 255:
            raise InvalidRequest(
                f"{where}.installation is empty or longer than 255 characters",
                reason="ORIGIN_INVALID",
            )
        names.parse_revision(current.revision, f"{where}.revision")
        names.check_text(current.notes, f"{where}.notes")
        names.check_labels(dict(current.labels))
        current = current.origin if current.HasField("origin") else None
        where += ".origin"
    return raw


async def _chunks(incoming: AsyncIterator[pb.UploadBundleRequest]) -> AsyncIterator[bytes]:
    async for message in incoming:
        if message.WhichOneof("message") != "data":
            raise InvalidRequest(
                "after the header of an upload comes only data", reason="DATA_EXPECTED"
            )
        yield message.data


def _masked(mask: FieldMask, message: Message, allowed: Iterable[str]) -> set[str]:
    """Return which of the fields that may change are to be changed.

    Raises:
        InvalidRequest: the mask names another field.
    """
    allowed = tuple(allowed)
    if not mask.paths:
        return {name for name in allowed if getattr(message, name)}
    if list(mask.paths) == ["*"]:
        return set(allowed)
    for path in mask.paths:
        if path not in allowed:
            raise InvalidRequest(
                f"update_mask {path!r} cannot be changed; {' and '.join(allowed)} can",
                reason="FIELD_MASK_INVALID",
                path=path[:200],
            )
    return set(mask.paths)


def _model(session: Session, row: Model) -> pb.Model:
    return encode.model(row, registry.aliases_of(session, [row.name])[row.name])


def _encode_revisions(session: Session, model: str, rows: Sequence[Revision]) -> list[pb.Revision]:
    of_model = registry.aliases_of(session, [model])[model]
    bundles = bundle_rows.bundles_of(session, rows)
    return [encode.revision(row, bundles[row.bundle_sha256], of_model) for row in rows]
