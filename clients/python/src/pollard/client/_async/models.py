"""The registry: bundles in and out, aliases, what the servers run."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence

import grpc

from pollard.client import _channel, _convert
from pollard.client._async import _io
from pollard.client._async._base import AsyncBaseClient
from pollard.client._bundle import BundleTar, BundleWriter
from pollard.client._names import (
    alias_name,
    checked_alias,
    choice_name,
    model_name,
    revision_name,
    rollout_name,
)
from pollard.client._switch import has_moved
from pollard.client._upload import ProgressCallback, Upload, transfer_timeout
from pollard.client.errors import (
    AliasSwitchTimeout,
    DeadlineExceeded,
    InvalidAnswer,
    InvalidBundle,
    NotFound,
    Unavailable,
    from_rpc_error,
)
from pollard.client.types import (
    Alias,
    DamagedFile,
    Event,
    Model,
    Progress,
    Pushed,
    Revision,
    Rollout,
    Server,
    Verified,
)
from pollard.models.v1 import (
    fleet_service_pb2,
    fleet_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
)

_SERVICE = "/pollard.models.v1.ModelService"
_PAGE = 200
_FIRST_POLL_SECONDS = 0.02
_LAST_POLL_SECONDS = 0.5
# Reading a large store from a slow disk may well take hours.
_VERIFY_SECONDS = 24 * 3600.0


class AsyncModelsClient(AsyncBaseClient):
    """Asks the model management server."""

    def __init__(
        self,
        address: str = _channel.DEFAULT_MODELS_ADDRESS,
        *,
        timeout: float = _channel.DEFAULT_TIMEOUT_SECONDS,
        retry: _channel.RetryPolicy | None = None,
        max_message_bytes: int = _channel.DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """Make a client; the arguments are those of every client (`AsyncBaseClient`)."""
        super().__init__(address, timeout=timeout, retry=retry, max_message_bytes=max_message_bytes)
        self._stub = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._fleet = fleet_service_pb2_grpc.FleetServiceStub(self._channel)

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
    ) -> Pushed:
        """Store a bundle as the next revision of a model, and point an alias at it if asked to.

        Every file is checked against the manifest before anything is sent. An upload that breaks
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
        tar, sha256 = await _io.run_blocking(BundleTar.open, os.fspath(directory))
        upload = Upload(
            tar,
            sha256,
            parent,
            notes=notes,
            labels=dict(labels or {}),
            alias=alias or "",
            allow_signature_change=allow_signature_change,
            idle_seconds=idle_timeout,
            progress=progress,
        )
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
        return Pushed(revision, response.existed, current)

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
            call = self._stub.DownloadBundle(request, timeout=transfer_timeout(found.size_bytes))
            try:
                async for piece in call:
                    writer.write(piece.path, piece.offset, piece.data, piece.total_bytes)
                    done += len(piece.data)
                    if progress is not None:
                        progress(Progress(done, max(done, found.size_bytes)))
            except grpc.RpcError as error:
                raise from_rpc_error(
                    error, address=self.address, method=f"{_SERVICE}/DownloadBundle"
                ) from None
            except (InvalidBundle, OSError):
                call.cancel()
                raise
            await _io.run_blocking(writer.finish, found.bundle_sha256)
        return found

    async def models(self) -> list[Model]:
        """List all models by name."""
        models: list[Model] = []
        token = ""
        while True:
            request = model_service_pb2.ListModelsRequest(page_size=_PAGE, page_token=token)
            page = await self._call(f"{_SERVICE}/ListModels", self._stub.ListModels, request, None)
            models += [_convert.model(item) for item in page.models]
            token = page.next_page_token
            if not token:
                return models

    async def model(self, model: str) -> Model:
        """Get one model with its aliases. Raises NotFound when there is none."""
        request = model_service_pb2.GetModelRequest(name=model_name(model))
        response = await self._call(f"{_SERVICE}/GetModel", self._stub.GetModel, request, None)
        return _convert.model(response.model)

    async def revisions(self, model: str) -> list[Revision]:
        """List all revisions of a model, newest first."""
        revisions: list[Revision] = []
        token = ""
        while True:
            request = model_service_pb2.ListRevisionsRequest(
                parent=model_name(model), page_size=_PAGE, page_token=token
            )
            page = await self._call(
                f"{_SERVICE}/ListRevisions", self._stub.ListRevisions, request, None
            )
            revisions += [_convert.revision(item) for item in page.revisions]
            token = page.next_page_token
            if not token:
                return revisions

    async def revision(
        self, model: str, *, revision: int | None = None, alias: str | None = None
    ) -> Revision:
        """Get one revision, by number or alias (by default "production"), with its variants."""
        request = model_service_pb2.GetRevisionRequest(name=choice_name(model, revision, alias))
        response = await self._call(
            f"{_SERVICE}/GetRevision", self._stub.GetRevision, request, None
        )
        return _convert.revision(response.revision)

    async def alias(self, model: str, alias: str = "production") -> Alias:
        """Get one alias with the state of its switch."""
        request = model_service_pb2.GetAliasRequest(name=alias_name(model, alias))
        response = await self._call(f"{_SERVICE}/GetAlias", self._stub.GetAlias, request, None)
        return _convert.alias(response.alias)

    async def set_alias(
        self,
        model: str,
        alias: str,
        revision: int,
        *,
        etag: str = "",
        allow_signature_change: bool = False,
        wait: bool = True,
        wait_timeout: float = 120.0,
    ) -> Alias:
        """Point an alias at a revision, creating it when needed.

        Every inference server loads the revision beside the old one; only then the routes change.

        Args:
            model: Model name.
            alias: Alias, such as "production".
            revision: Revision number.
            etag: Guards against a change in between; empty for no guard.
            allow_signature_change: Let the inputs differ from the current revision's.
            wait: Whether to wait until the alias has moved or its switch has failed.
            wait_timeout: How long to wait, in seconds.

        Raises:
            NotFound: There is no such model or revision.
            FailedPrecondition: The inputs differ and that was not allowed.
            Aborted: The alias changed in between.
            AliasSwitchFailed: A server refused the revision; the alias stayed where it was.
            AliasSwitchTimeout: The switch had not ended in time; it goes on.
        """
        request = model_service_pb2.SetAliasRequest(
            name=alias_name(model, alias),
            revision=revision,
            etag=etag,
            allow_signature_change=allow_signature_change,
            request_id=str(uuid.uuid4()),
        )
        revision_name(model, revision)  # checks the number
        response = await self._call(f"{_SERVICE}/SetAlias", self._stub.SetAlias, request, None)
        if not wait:
            return _convert.alias(response.alias)
        return await self.wait_alias(model, alias, revision, wait_timeout=wait_timeout)

    async def rollback(
        self,
        model: str,
        alias: str = "production",
        *,
        etag: str = "",
        wait: bool = True,
        wait_timeout: float = 120.0,
    ) -> Alias:
        """Point an alias back at the revision that it pointed at before.

        Args:
            model: Model name.
            alias: Alias to move.
            etag: Guards against a change in between; empty for no guard.
            wait: Whether to wait until the alias has moved or its switch has failed.
            wait_timeout: How long to wait, in seconds.

        Raises:
            FailedPrecondition: There is no revision before.
            AliasSwitchFailed: A server refused the revision; the alias stayed where it was.
        """
        request = model_service_pb2.RollbackAliasRequest(
            name=alias_name(model, alias), etag=etag, request_id=str(uuid.uuid4())
        )
        response = await self._call(
            f"{_SERVICE}/RollbackAlias", self._stub.RollbackAlias, request, None
        )
        found = _convert.alias(response.alias)
        if not wait:
            return found
        return await self.wait_alias(
            model, alias, found.pending_revision or found.revision, wait_timeout=wait_timeout
        )

    async def wait_alias(
        self, model: str, alias: str, revision: int, *, wait_timeout: float = 120.0
    ) -> Alias:
        """Wait until an alias leads to a revision everywhere, or its switch has failed.

        A manager that is away for a while is waited for, within the same time.

        Raises:
            AliasSwitchFailed: The switch failed, or another one overtook it.
            AliasSwitchTimeout: It had not ended in time; it goes on.
        """
        give_up = time.monotonic() + _channel.checked_timeout(wait_timeout, wait_timeout)
        pause = _FIRST_POLL_SECONDS
        current: Alias | None = None
        while True:
            try:
                current = await self.alias(model, alias)
            except (Unavailable, DeadlineExceeded):
                if time.monotonic() >= give_up:
                    raise
            else:
                if has_moved(current, revision):
                    return current
                if time.monotonic() >= give_up:
                    raise AliasSwitchTimeout(
                        f"alias {alias!r} of {model!r} is still {current.state} towards revision "
                        f"{revision} after {wait_timeout:g} s; the switch goes on. See `pollard "
                        f"models show {model}` and `pollard fleet`",
                        alias=alias_name(model, alias),
                        wanted=revision,
                        serving=current.revision,
                    )
            await _io.sleep(min(pause, max(0.0, give_up - time.monotonic())))
            pause = min(pause * 1.5, _LAST_POLL_SECONDS)

    async def start_rollout(
        self,
        model: str,
        revision: int,
        *,
        alias: str = "production",
        steps: Sequence[float] = (),
        hold: float | None = None,
        min_requests: int = 0,
        max_error_rate: float = 0.0,
        max_p99_ratio: float = 0.0,
        shadow_percent: float = 0.0,
        min_agreement: float = 0.0,
    ) -> Rollout:
        """Move an alias to a revision in steps; the manager takes it back when it is worse.

        Args:
            model: Model name.
            revision: Revision to move to.
            alias: Alias that moves.
            steps: Growing shares in percent, the last 100; empty for 5, 25, 50, 100.
            hold: Seconds that each step lasts at least; None for 60.
            min_requests: Requests to the revision that each step must have seen; 0 for 200.
            max_error_rate: Largest rate of failed requests, 0 to 1; 0 for 0.005.
            max_p99_ratio: Largest ratio of the 99th percentiles of the latency; 0 for 1.2.
            shadow_percent: Share of requests also sent as shadows; 0 for none.
            min_agreement: Smallest share of shadows whose first answer agrees.

        Raises:
            InvalidArgument: A value is out of its range.
            NotFound: There is no such model, alias or revision.
            FailedPrecondition: The alias is moved already or leads there, or the inputs differ.
            Unimplemented: The manager offers no shadows.
        """
        revision_name(model, revision)  # checks the number
        rollout = model_service_pb2.Rollout(
            alias=checked_alias(alias),
            revision=revision,
            steps=steps,
            shadow_percent=shadow_percent,
            gates=model_service_pb2.RolloutGates(
                min_requests=min_requests,
                max_error_rate=max_error_rate,
                max_p99_ratio=max_p99_ratio,
                min_agreement=min_agreement,
            ),
        )
        if hold is not None:
            rollout.hold.FromMicroseconds(round(hold * 1e6))
        request = model_service_pb2.CreateRolloutRequest(
            parent=model_name(model), rollout=rollout, request_id=str(uuid.uuid4())
        )
        response = await self._call(
            f"{_SERVICE}/CreateRollout", self._stub.CreateRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def rollout(self, model: str, rollout: int) -> Rollout:
        """Get one rollout. Raises NotFound when there is none."""
        request = model_service_pb2.GetRolloutRequest(name=rollout_name(model, rollout))
        response = await self._call(f"{_SERVICE}/GetRollout", self._stub.GetRollout, request, None)
        return _convert.rollout(response.rollout)

    async def rollouts(self, model: str) -> list[Rollout]:
        """List the rollouts of a model, newest first."""
        rollouts: list[Rollout] = []
        token = ""
        while True:
            request = model_service_pb2.ListRolloutsRequest(
                parent=model_name(model), page_size=_PAGE, page_token=token
            )
            page = await self._call(
                f"{_SERVICE}/ListRollouts", self._stub.ListRollouts, request, None
            )
            rollouts += [_convert.rollout(item) for item in page.rollouts]
            token = page.next_page_token
            if not token:
                return rollouts

    async def pause_rollout(self, model: str, rollout: int, *, etag: str = "") -> Rollout:
        """Keep a rollout at its step; it is still taken back when it is worse.

        Raises:
            NotFound: There is no such rollout.
            FailedPrecondition: It has ended.
            Aborted: It changed in between.
        """
        request = model_service_pb2.PauseRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=str(uuid.uuid4())
        )
        response = await self._call(
            f"{_SERVICE}/PauseRollout", self._stub.PauseRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def resume_rollout(self, model: str, rollout: int, *, etag: str = "") -> Rollout:
        """Go on with a paused rollout. Raises as `pause_rollout`."""
        request = model_service_pb2.ResumeRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=str(uuid.uuid4())
        )
        response = await self._call(
            f"{_SERVICE}/ResumeRollout", self._stub.ResumeRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def promote_rollout(self, model: str, rollout: int, *, etag: str = "") -> Rollout:
        """End a rollout at 100 % now. Raises as `pause_rollout`."""
        request = model_service_pb2.PromoteRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=str(uuid.uuid4())
        )
        response = await self._call(
            f"{_SERVICE}/PromoteRollout", self._stub.PromoteRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def abort_rollout(self, model: str, rollout: int, *, etag: str = "") -> Rollout:
        """End a rollout; all requests go to the revision before. Raises as `pause_rollout`."""
        request = model_service_pb2.AbortRolloutRequest(
            name=rollout_name(model, rollout), etag=etag, request_id=str(uuid.uuid4())
        )
        response = await self._call(
            f"{_SERVICE}/AbortRollout", self._stub.AbortRollout, request, None
        )
        return _convert.rollout(response.rollout)

    async def delete_alias(self, model: str, alias: str, *, etag: str = "") -> None:
        """Remove an alias; requests that name it then get NOT_FOUND."""
        request = model_service_pb2.DeleteAliasRequest(
            name=alias_name(model, alias), etag=etag, request_id=str(uuid.uuid4())
        )
        await self._call(f"{_SERVICE}/DeleteAlias", self._stub.DeleteAlias, request, None)

    async def delete(
        self, model: str, *, revision: int | None = None, force: bool = False, etag: str = ""
    ) -> None:
        """Delete a revision, or without one the whole model.

        Args:
            model: Model name.
            revision: Revision to delete; None for the model with all its revisions.
            force: Stop serving the model first; only for a whole model.
            etag: Guards against a change in between; empty for no guard.

        Raises:
            NotFound: There is no such model or revision.
            FailedPrecondition: An alias points at it, or it is being drained.
        """
        if revision is not None and force:
            raise ValueError("force is for a whole model; move the alias away first")
        request_id = str(uuid.uuid4())
        if revision is not None:
            await self._call(
                f"{_SERVICE}/DeleteRevision",
                self._stub.DeleteRevision,
                model_service_pb2.DeleteRevisionRequest(
                    name=revision_name(model, revision), etag=etag, request_id=request_id
                ),
                None,
            )
            return
        await self._call(
            f"{_SERVICE}/DeleteModel",
            self._stub.DeleteModel,
            model_service_pb2.DeleteModelRequest(
                name=model_name(model), force=force, etag=etag, request_id=request_id
            ),
            None,
        )

    async def events(self, model: str | None = None, *, limit: int = 50) -> list[Event]:
        """List the newest changes in the registry, at most 1000, newest first."""
        if not 1 <= limit <= 1000:
            raise ValueError(f"limit must be 1 to 1000, not {limit}")
        request = model_service_pb2.ListEventsRequest(
            page_size=limit, model="" if model is None else model_name(model)
        )
        response = await self._call(f"{_SERVICE}/ListEvents", self._stub.ListEvents, request, None)
        return [_convert.event(item) for item in response.events]

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
                error, address=self.address, method=f"{_SERVICE}/VerifyStore"
            ) from None
        return Verified(last.checked_files, last.checked_bytes, tuple(damaged))

    async def servers(self) -> list[Server]:
        """List the servers that the manager knows, by id, with what they run."""
        servers: list[Server] = []
        token = ""
        while True:
            request = fleet_service_pb2.ListServersRequest(page_size=_PAGE, page_token=token)
            page = await self._call(
                "/pollard.models.v1.FleetService/ListServers",
                self._fleet.ListServers,
                request,
                None,
            )
            servers += [_convert.server(item) for item in page.servers]
            token = page.next_page_token
            if not token:
                return servers

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
                    from_rpc_error(error, address=self.address, method=f"{_SERVICE}/UploadBundle")
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
            response = await self._call(
                f"{_SERVICE}/GetUpload", self._stub.GetUpload, request, None
            )
        except NotFound:
            return 0
        return response.committed_bytes
