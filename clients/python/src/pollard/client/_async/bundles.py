"""Bundles into the registry and out of it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import grpc

from pollard.client import _convert, _copying
from pollard.client._async import _io
from pollard.client._async._manager import SERVICE
from pollard.client._async.aliases import AliasMethods
from pollard.client._async.revisions import RevisionMethods
from pollard.client._bundle import BundleTar, BundleWriter
from pollard.client._names import checked_alias, checked_model, model_name, revision_name
from pollard.client._retrying import Attempts
from pollard.client._upload import ProgressCallback, Upload, transfer_timeout
from pollard.client.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidAnswer,
    InvalidBundle,
    NotFound,
    Unavailable,
    from_rpc_error,
)
from pollard.client.types import (
    Copied,
    DamagedFile,
    Origin,
    Progress,
    Pushed,
    Revision,
    Verified,
)
from pollard.models.v1 import model_service_pb2

# Reading a large store from a slow disk may well take hours.
_VERIFY_SECONDS = 24 * 3600.0


async def _find_copy(to: RevisionMethods, model: str, source: Revision) -> Revision | None:
    """Return the revision there that lacks nothing of `source`; None when there is none."""
    try:
        found = await to.revisions(model, bundle_sha256=source.bundle_sha256)
    except NotFound:
        return None
    return next((each for each in found if _copying.is_complete(each, source)), None)


class BundleMethods(AliasMethods, RevisionMethods):
    """Methods of the models client that move bundles."""

    async def push(
        self,
        directory: str | os.PathLike[str],
        model: str,
        *,
        alias: str | None = None,
        notes: str = "",
        labels: Mapping[str, str] | None = None,
        allow_signature_change: bool = False,
        wait: bool = True,
        wait_timeout: float = 120.0,
        idle_timeout: float = 60.0,
        progress: ProgressCallback | None = None,
        origin: Origin | None = None,
        upload_id: str | None = None,
    ) -> Pushed:
        """Store a bundle as the next revision of a model, and point an alias at it if asked to.

        Every file is checked against the manifest while it is sent. An upload that breaks
        goes on from what the server has on disk, until nothing has moved for `idle_timeout`.

        Args:
            directory: The bundle.
            model: Model name; the model is created when it does not exist.
            alias: Alias to point at the new revision; None for none.
            notes: Free text kept with the revision.
            labels: Labels kept with the revision, at most 64.
            allow_signature_change: Let the inputs differ from the alias's current revision.
            wait: Whether to wait until the alias has moved.
            wait_timeout: How long to wait for that, in seconds.
            idle_timeout: How long, in seconds, nothing may move while uploading.
            progress: Called as bytes go out.
            origin: The revision of another installation that it is a copy of.
            upload_id: UUID of the upload. The same one again goes on where an upload that was
                broken off ended, also in another process; None makes one up.

        Raises:
            InvalidBundle: The directory is no bundle, or a file differs from its digest.
            InvalidArgument, DataLoss: The server's own checks refused the bundle.
            ResourceExhausted: The server's disk is full.
            AliasSwitchFailed: The revision is stored, but the alias did not move to it.
            RequestFailed: Anything else that the server answers.
        """
        parent = model_name(model)
        if alias is not None:
            checked_alias(alias)
        tar = await _io.run_blocking(BundleTar.open, os.fspath(directory))
        upload = Upload(
            tar,
            parent,
            notes=notes,
            labels=dict(labels or {}),
            alias=alias or "",
            allow_signature_change=allow_signature_change,
            idle_seconds=idle_timeout,
            progress=progress,
            origin=None if origin is None else _convert.origin_message(origin),
        )
        if upload_id is not None:
            upload.upload_id = upload_id
        response = await self._upload(upload)
        revision = _convert.revision(response.revision)
        if revision.bundle_sha256 != tar.bundle_sha256:
            raise InvalidAnswer(
                f"the server stored the bundle {revision.bundle_sha256} instead of "
                f"{tar.bundle_sha256}"
            )
        current = None
        if alias is not None and wait:
            current = await self.wait_alias(
                model, alias, revision.revision, wait_timeout=wait_timeout
            )
        return Pushed(revision, response.existed, current, tuple(response.warnings))

    async def copy(
        self,
        model: str,
        to: BundleMethods,
        *,
        revision: int | None = None,
        alias: str | None = None,
        name: str | None = None,
        installation: str | None = None,
        spool: str | os.PathLike[str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> Copied:
        """Copy a revision to another installation: bundle, signature, notes, labels and origin.

        The bundle keeps its digest. It is fetched to this machine first and then sent; a copy that
        was broken off goes on from the bytes that arrived there, also in another process. What is
        there already is not sent again, unless it lacks the signature.

        Args:
            model: Model name here.
            to: The other installation's client.
            revision: Revision to copy; by default the one that the alias points at.
            alias: Alias to follow; by default "production".
            name: Model name there; by default the same.
            installation: How the origin names this installation; by default its address.
            spool: Directory for bundles on their way; by default in the user's cache.
            progress: Called as bytes come in and go out; the total is twice the bundle.

        Raises:
            NotFound: There is no such model, revision or alias.
            InvalidBundle: What came does not fit its digests.
            RequestFailed: Anything else that one of the servers answers.
        """
        source = await self.revision(model, revision=revision, alias=alias)
        target = checked_model(name or model)
        there = await _find_copy(to, target, source)
        if there is not None:
            return Copied(source, there, True)
        place = _copying.place(spool, source)
        total = 2 * source.size_bytes
        if not place.exists():
            await self.pull(
                model,
                place,
                revision=source.revision,
                progress=_copying.part(progress, 0, total),
            )
        origin = Origin(
            installation or self.address,
            source.model,
            source.revision,
            source.creator,
            source.create_time,
            source.notes,
            source.labels,
            source.aliases,
            source.origin,
        )
        upload_id = _copying.upload_id(to.address, target, source)
        while True:
            try:
                pushed = await to.push(
                    place,
                    target,
                    notes=source.notes,
                    labels=source.labels,
                    wait=False,
                    origin=origin,
                    upload_id=upload_id,
                    progress=_copying.part(progress, source.size_bytes, total),
                )
                break
            except FailedPrecondition as error:
                # That upload became a revision once, which was deleted since.
                if error.reason != "REVISION_DELETED" or upload_id is None:
                    raise
                upload_id = None
        await _io.run_blocking(_copying.forget, place)
        return Copied(source, pushed.revision, pushed.existed, pushed.warnings)

    async def pull(
        self,
        model: str,
        directory: str | os.PathLike[str],
        *,
        revision: int | None = None,
        alias: str | None = None,
        progress: ProgressCallback | None = None,
    ) -> Revision:
        """Fetch a bundle into a directory that does not exist yet or is empty.

        The bundle is written beside the directory, checked, and renamed when it is whole.

        Args:
            model: Model name.
            directory: Where to put it.
            revision: Revision to fetch; by default the one that the alias points at.
            alias: Alias to follow; by default "production".
            progress: Called as bytes come in.

        Raises:
            FileExistsError: The directory holds something.
            NotFound: There is no such model, revision or alias.
            InvalidBundle: What came does not fit its digests; nothing is left behind.
            RequestFailed: Anything else that the server answers.
        """
        found = await self.revision(model, revision=revision, alias=alias)
        request = model_service_pb2.DownloadBundleRequest(name=revision_name(model, found.revision))
        done = 0
        with BundleWriter(directory) as writer:
            method = f"{SERVICE}/DownloadBundle"
            attempts = Attempts(self._retry, method, transfer_timeout(found.size_bytes))
            while True:
                call = self._stub.DownloadBundle(request, timeout=attempts.timeout)
                try:
                    async for piece in call:
                        writer.write(piece.path, piece.offset, piece.data, piece.total_bytes)
                        done += len(piece.data)
                        if progress is not None:
                            progress(Progress(done, max(done, found.size_bytes)))
                    break
                except grpc.RpcError as error:
                    failure = from_rpc_error(error, address=self.address, method=method)
                    # What has begun to come does not come from its beginning again.
                    pause = attempts.pause(error) if done == 0 else None
                except (InvalidBundle, OSError):
                    call.cancel()
                    raise
                if pause is not None and not self._closed:
                    await _io.sleep(pause)
                if pause is None or self._closed:
                    raise failure
            await _io.run_blocking(writer.finish, found.bundle_sha256)
        return found

    async def verify(
        self, model: str | None = None, *, progress: ProgressCallback | None = None
    ) -> Verified:
        """Let the manager read every stored file again and compare it with its digest.

        Nothing is changed. To make a damaged file whole, push its bundle again.

        Args:
            model: Only the revisions of this model; None for all.
            progress: Called now and then with the bytes read.

        Raises:
            NotFound: There is no such model.
        """
        request = model_service_pb2.VerifyStoreRequest(
            parent="" if model is None else model_name(model)
        )
        damaged: list[DamagedFile] = []
        last = model_service_pb2.VerifyStoreResponse()
        try:
            async for last in self._stub.VerifyStore(request, timeout=_VERIFY_SECONDS):
                damaged += [_convert.damaged_file(item) for item in last.damaged]
                if progress is not None:
                    progress(Progress(last.checked_bytes, last.total_bytes))
        except grpc.RpcError as error:
            raise from_rpc_error(
                error, address=self.address, method=f"{SERVICE}/VerifyStore"
            ) from None
        return Verified(last.checked_files, last.checked_bytes, tuple(damaged))

    async def _upload(self, upload: Upload) -> model_service_pb2.UploadBundleResponse:
        # Asking first costs one round trip and tells a server that is not there at once, where
        # the upload itself would be tried again for a minute.
        offset = await self._committed(upload)
        furthest = offset
        give_up = time.monotonic() + upload.idle_seconds
        pause = 0.2
        timeout = transfer_timeout(upload.tar.total_bytes)
        while True:
            try:
                return await _io.send_upload(self._stub.UploadBundle, upload, offset, timeout)
            except grpc.RpcError as error:
                failure = upload.failure(
                    from_rpc_error(error, address=self.address, method=f"{SERVICE}/UploadBundle")
                )
            if upload.error is not None:
                raise upload.error
            if not upload.may_resume(failure):
                raise failure
            while True:
                await _io.sleep(pause)
                pause = min(pause * 1.5, 2.0)
                try:
                    offset = await self._committed(upload)
                    break
                except (Unavailable, DeadlineExceeded):
                    if time.monotonic() >= give_up:
                        raise failure from None
            if offset > furthest:
                furthest, pause = offset, 0.2
                give_up = time.monotonic() + upload.idle_seconds
            elif time.monotonic() >= give_up:
                raise failure

    async def _committed(self, upload: Upload) -> int:
        request = model_service_pb2.GetUploadRequest(
            parent=upload.parent, upload_id=upload.upload_id
        )
        try:
            response = await self._call(f"{SERVICE}/GetUpload", self._stub.GetUpload, request, None)
        except NotFound:
            return 0
        return response.committed_bytes
