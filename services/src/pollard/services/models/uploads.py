"""Uploads: bytes to disk, whole and checked into the registry, or not at all.

What arrives is split into the files of the bundle (:mod:`.part`) and can be resumed, after
a kill too. The bundle is checked in a child; its files then become blobs, and one
transaction makes them a revision. Only after that the client gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import shutil
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import delete
from sqlalchemy.orm import Session

from pollard.runtime.bundle import MANIFEST, SIGNATURE, Bundle
from pollard.runtime.disk import disk_full
from pollard.runtime.signing import Signature
from pollard.services.common.errors import (
    Conflict,
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    ServiceError,
)
from pollard.services.common.telemetry.traces import within
from pollard.services.models import aliases, bundle_rows, registry, signatures
from pollard.services.models.blobs import Blobs
from pollard.services.models.checks import Check, CheckLimits
from pollard.services.models.collector import Collector, release, release_dead
from pollard.services.models.events import DAY_US
from pollard.services.models.part import Part, committed_bytes, last_change
from pollard.services.models.part import remove as remove_part
from pollard.services.models.part_writer import PartWriter, settled
from pollard.services.models.schema import Revision, Upload
from pollard.services.models.signatures import SignaturePolicy
from pollard.services.models.store import Store, now_us

# Below it, starting the child early would gain nothing.
_EARLY_BYTES = 16 * 1024 * 1024
_DAY_SECONDS = 24 * 3600.0

_log = structlog.get_logger("pollard.uploads")


@dataclass(frozen=True)
class UploadRequest:
    """What a client says of an upload before the bytes."""

    model: str
    upload_id: str
    write_offset: int
    total_bytes: int
    sha256: str = ""
    """Of the whole tar; may be empty if ``bundle_sha256`` is given."""
    bundle_sha256: str = ""
    """Of the manifest, which has those of all files; may be empty if ``sha256`` is given."""
    notes: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    alias: str = ""
    allow_signature_change: bool = False
    origin: bytes = b""
    """Serialised ``Origin`` of the contract; empty for none."""


@dataclass(frozen=True)
class Uploaded:
    """The revision that an upload became."""

    model: str
    revision: int
    existed: bool
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class _Running:
    """The stream that is sending an upload now."""

    task: asyncio.Task[Any]
    replaced: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Uploads:
    """Receives bundles.

    Args:
        store: Where everything is kept.
        blobs: Where the files go.
        collector: Keeps them there.
        limits: What checking a bundle may use.
        max_bundle_bytes: Largest tar.
        parallel_checks: Children that check at the same time; as many may wait for
            what is still arriving.
        policy: What is asked of signatures.
    """

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        collector: Collector,
        *,
        limits: CheckLimits,
        max_bundle_bytes: int,
        parallel_checks: int = 2,
        policy: SignaturePolicy | None = None,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._collector = collector
        self._limits = limits
        self._policy = policy or SignaturePolicy()
        self._max_bundle_bytes = max_bundle_bytes
        self._checking = asyncio.Semaphore(parallel_checks)
        self._waiting = asyncio.Semaphore(parallel_checks)
        self._running: dict[str, _Running] = {}

    def part(self, upload_id: str) -> Path:
        """Return where an upload is kept until it is a revision."""
        return self._store.uploads / f"{upload_id}.part"

    async def committed_bytes(self, model: str, upload_id: str) -> int:
        """Return how many bytes of an upload are on disk.

        Raises:
            NotFound: nothing is known of it.
        """
        row = await self._store.read(lambda session: session.get(Upload, upload_id))
        if row is not None and row.model == model:
            if row.revision:
                return row.total_bytes
            with contextlib.suppress(FileNotFoundError):
                return await asyncio.to_thread(committed_bytes, self.part(upload_id))
        raise NotFound(
            f"nothing is known of the upload {upload_id}; begin at 0",
            reason="UPLOAD_NOT_FOUND",
            upload_id=upload_id,
        )

    async def receive(
        self, request: UploadRequest, chunks: AsyncIterator[bytes], actor: str
    ) -> Uploaded:
        """Take in an upload, or the rest of one, and make it a revision.

        A newer stream of the same upload ends an older one, which may hang on
        a connection that is long dead.

        Raises:
            InvalidRequest: what was sent is not acceptable; nothing of it is kept.
            OutOfRange: the offset is not the committed size.
            DataLoss: the bytes have another SHA-256; nothing of them is kept.
            ResourceExhausted: the disk is full; nothing is kept.
            FailedPrecondition: the alias cannot point at it; the bytes are kept.
            Conflict: another stream has taken over.
        """
        self._check(request)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - tells the type checker that this runs in a task
        mine = _Running(task)
        older = self._running.get(request.upload_id)
        self._running[request.upload_id] = mine
        if older is not None:
            older.replaced = True
            older.task.cancel()
        try:
            if older is not None:
                await older.ended.wait()
            return await self._receive(request, chunks, actor)
        except asyncio.CancelledError:
            if not mine.replaced:
                raise
            task.uncancel()
            raise Conflict(
                f"another stream has taken over the upload {request.upload_id}",
                reason="UPLOAD_TAKEN_OVER",
                upload_id=request.upload_id,
            ) from None
        finally:
            mine.ended.set()
            if self._running.get(request.upload_id) is mine:
                del self._running[request.upload_id]

    def _check(self, request: UploadRequest) -> None:
        if not 0 < request.total_bytes <= self._max_bundle_bytes:
            raise InvalidRequest(
                f"total_bytes {request.total_bytes} is not between 1 and "
                f"{self._max_bundle_bytes}, the largest bundle that this manager takes",
                reason="SIZE_INVALID",
                total_bytes=request.total_bytes,
                limit=self._max_bundle_bytes,
            )
        if request.write_offset < 0:
            raise InvalidRequest(
                f"write_offset {request.write_offset} is negative",
                reason="OFFSET_INVALID",
                write_offset=request.write_offset,
            )

    async def _receive(
        self, request: UploadRequest, chunks: AsyncIterator[bytes], actor: str
    ) -> Uploaded:
        done = await self._store.write(lambda session: _begin(session, request))
        if done is not None:
            return done
        part = Part(
            self.part(request.upload_id),
            max_files=self._limits.max_files,
            max_total_bytes=self._limits.max_unpacked_bytes,
            hash_tar=bool(request.sha256),
        )
        try:
            try:
                await asyncio.to_thread(part.open)
                self._check_room(request, part.size)
                async with self._start_early(request, part) as check:
                    with within("receive", attributes={"pollard.bytes": request.total_bytes}):
                        await self._receive_bytes(request, part, chunks)
                    return await self._make_revision(request, part, check, actor)
            finally:
                # To its end, also where whoever waits for it is cancelled once more.
                await settled(asyncio.ensure_future(asyncio.to_thread(part.close)))
        except BaseException as error:
            if _is_final(error):
                await self._forget(request.upload_id)
            if isinstance(error, OSError):
                raise _disk_error(error) from error
            raise

    def _check_room(self, request: UploadRequest, committed: int) -> None:
        if request.write_offset != committed:
            raise OutOfRange(
                f"write_offset is {request.write_offset}, but {committed} bytes are on disk; "
                "go on from there",
                reason="OFFSET_MISMATCH",
                write_offset=request.write_offset,
                committed_bytes=committed,
            )
        missing = request.total_bytes - committed
        free = shutil.disk_usage(self._store.directory).free
        if free < missing:
            raise ResourceExhausted(
                f"the store has {free} bytes free, the upload needs {missing}; free some space and "
                "try again",
                reason="DISK_FULL",
                free_bytes=free,
                needed_bytes=missing,
            )

    @contextlib.asynccontextmanager
    async def _start_early(
        self, request: UploadRequest, part: Part
    ) -> AsyncGenerator[Check | None]:
        """Start the child of a large upload while it arrives; None for a small one.

        Waiting has slots of its own, because an upload may be slow or hang; without a free one
        the child starts when the upload is whole.
        """
        large = request.total_bytes - request.write_offset >= _EARLY_BYTES
        if not large or self._waiting.locked():
            yield None
            return
        async with self._waiting:
            check = Check(part.bundle, self._limits, self._policy.trusted)
            try:
                yield check
            finally:
                await check.end()

    async def _receive_bytes(
        self, request: UploadRequest, part: Part, chunks: AsyncIterator[bytes]
    ) -> None:
        writer = PartWriter(part, request.total_bytes)
        try:
            async for chunk in chunks:
                await writer.write(chunk)
            await writer.flush()
        finally:
            await writer.close()
            if part.size < request.total_bytes:
                # What broke off must be there for the rest.
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(part.sync)
        if part.size < request.total_bytes:
            raise InvalidRequest(
                f"the stream ended after {part.size} of {request.total_bytes} bytes; go on from "
                "there",
                reason="UPLOAD_INCOMPLETE",
                committed_bytes=part.size,
                total_bytes=request.total_bytes,
            )
        for what, actual, expected in (
            ("tar", part.tar_sha256, request.sha256),
            ("manifest", part.digests.get(MANIFEST, ""), request.bundle_sha256),
        ):
            if expected and actual != expected:
                raise DataLoss(
                    f"the bytes were damaged on the way: the SHA-256 of the {what} is "
                    f"{actual or 'missing'}, the header says {expected}. Upload again from 0",
                    reason="DIGEST_MISMATCH",
                    expected=expected,
                    actual=actual,
                )
        if not part.ended:
            raise InvalidRequest(
                "not a readable uncompressed tar of a bundle: its end is missing",
                reason="ARCHIVE_INVALID",
            )

    async def _make_revision(
        self, request: UploadRequest, part: Part, early: Check | None, actor: str
    ) -> Uploaded:
        async with contextlib.AsyncExitStack() as stack:
            # The disk works while the child does.
            syncing = asyncio.ensure_future(asyncio.to_thread(part.sync))
            stack.push_async_callback(settled, syncing)
            async with self._checking:
                check = early
                if check is None:
                    check = Check(part.bundle, self._limits, self._policy.trusted)
                    stack.push_async_callback(check.end)
                with within("check"):
                    signature = await check.verdict(part.digests)
            warnings = self._policy.judge(signature)
            await syncing
            bundle = await asyncio.to_thread(_read_bundle, part, signature)
            with within("publish", attributes={"pollard.model": request.model}):
                uploaded = await self._store_bundle(request, bundle, part, actor)
            for warning in warnings:
                _log.warning(
                    "accepted with a warning",
                    model=uploaded.model,
                    revision=uploaded.revision,
                    warning=warning,
                )
            uploaded = replace(uploaded, warnings=warnings)
        await asyncio.to_thread(remove_part, part.directory)
        return uploaded

    async def _store_bundle(
        self, request: UploadRequest, bundle: bundle_rows.NewBundle, part: Part, actor: str
    ) -> Uploaded:
        digests = {file.sha256 for file in bundle.files}
        holder = await self._collector.hold(digests)
        try:
            await self._adopt(bundle, part)
            return await self._store.write(
                lambda session: _commit(session, request, bundle, actor, self._policy, holder)
            )
        except BaseException:
            await self._let_go(holder, digests)
            raise

    async def _adopt(self, bundle: bundle_rows.NewBundle, part: Part) -> None:
        def adopt() -> None:
            done: set[str] = set()
            for file in bundle.files:
                if stopped.is_set():
                    return
                if file.sha256 not in done:
                    self._blobs.adopt(part.bundle / file.path, file.sha256)
                    done.add(file.sha256)

        # A thread cannot be cancelled, and must be done with the files before they are deleted.
        stopped = threading.Event()
        adopting = asyncio.ensure_future(asyncio.to_thread(adopt))
        try:
            await asyncio.shield(adopting)
        finally:
            stopped.set()
            await settled(adopting)

    async def _let_go(self, holder: str, digests: set[str]) -> None:
        # Without it the hold ends after a day, and what is not referred to is collected then.
        with contextlib.suppress(ServiceError):
            await self._store.write(lambda session: release(session, holder))
            await asyncio.to_thread(self._collector.collect, digests)

    async def _forget(self, upload_id: str) -> None:
        await asyncio.to_thread(remove_part, self.part(upload_id))
        # A row without bytes does no harm, should the disk be too full to delete it.
        with contextlib.suppress(ResourceExhausted):
            await self._store.write(
                lambda session: session.execute(
                    delete(Upload).where(Upload.upload_id == upload_id, Upload.revision == 0)
                )
            )

    def clean(self, *, starting: bool = False) -> None:
        """Delete what was abandoned: uploads a day old, blobs without reference.

        Safe beside running uploads.

        Args:
            starting: No upload can be running, because the store was only just locked; then
                what is being stored belongs to nobody, however young. Blobs are left alone: to
                list them takes seconds where there are many, and nobody waits for it.
        """
        day_ago = time.time() - _DAY_SECONDS
        for part in self._store.uploads.iterdir():
            # A running upload changes its files all the time, so they are never so old. Earlier
            # versions kept a tar in a file, with which nothing can be done any more.
            if last_change(part) < day_ago or not part.is_dir():
                remove_part(part)

        def forget(session: Session) -> None:
            old = Upload.create_time < now_us() - DAY_US
            for row in session.query(Upload).filter(old):
                if not self.part(row.upload_id).exists():
                    session.delete(row)
            release_dead(session, self._store.manager_id if starting else "")
            registry.purge_expired(session)

        self._store.write_now(forget)
        # Where others may be writing too, only age tells what was abandoned.
        alone = starting and not self._blobs.shared
        self._blobs.remove_leftovers(math.inf if alone else day_ago)
        if not starting:
            self._collector.collect()


def _is_final(error: BaseException) -> bool:
    """Tell whether trying the same upload again cannot succeed, or the disk is full."""
    if isinstance(error, InvalidRequest):
        return error.reason not in ("UPLOAD_INCOMPLETE", "CHECK_TIMEOUT")
    return disk_full(error) or isinstance(error, (DataLoss, ResourceExhausted))


def _begin(session: Session, request: UploadRequest) -> Uploaded | None:
    """Write an upload down; return its revision if it was completed before."""
    row = session.get(Upload, request.upload_id)
    if row is None:
        session.add(_new_row(request))
        return None
    if (row.model, row.total_bytes, row.sha256) != (
        request.model,
        request.total_bytes,
        request.sha256 or request.bundle_sha256,
    ):
        raise InvalidRequest(
            f"upload_id {request.upload_id} was used for another upload; choose a new one",
            reason="UPLOAD_ID_REUSED",
            upload_id=request.upload_id,
        )
    if not row.revision:
        return None
    revision = session.get(Revision, (row.model, row.revision))
    if revision is None or revision.delete_time is not None:
        raise FailedPrecondition(
            f"the upload {request.upload_id} became revision {row.revision}, which was deleted; "
            "choose a new upload_id to store it again",
            reason="REVISION_DELETED",
            upload_id=request.upload_id,
            revision=row.revision,
        )
    return Uploaded(row.model, row.revision, row.existed)


def _new_row(request: UploadRequest) -> Upload:
    return Upload(
        upload_id=request.upload_id,
        model=request.model,
        total_bytes=request.total_bytes,
        sha256=request.sha256 or request.bundle_sha256,
        create_time=now_us(),
    )


def _commit(
    session: Session,
    request: UploadRequest,
    bundle: bundle_rows.NewBundle,
    actor: str,
    policy: SignaturePolicy,
    holder: str,
) -> Uploaded:
    revision, existed = registry.add_revision(
        session,
        request.model,
        bundle,
        notes=request.notes,
        labels=request.labels,
        actor=actor,
        origin=request.origin,
    )
    signatures.attach(session, bundle, actor)
    if request.alias:
        policy.check_served(session, request.model, revision.number)
        aliases.set_alias(
            session,
            request.model,
            request.alias,
            revision.number,
            etag="",
            allow_signature_change=request.allow_signature_change,
            actor=actor,
        )
    release(session, holder)
    row = session.get(Upload, request.upload_id)
    if row is None:  # it took more than a day, and another manager has forgotten it
        row = _new_row(request)
        session.add(row)
    row.revision = revision.number
    row.existed = existed
    return Uploaded(request.model, revision.number, existed)


def _read_bundle(part: Part, signed: Signature | None) -> bundle_rows.NewBundle:
    """Return what the registry keeps of a bundle that the child found good."""
    bundle = Bundle.open(part.bundle, verify=False)
    files = [
        bundle_rows.StoredFile(name, part.digests[name], (part.bundle / name).stat().st_size)
        for name in (MANIFEST, SIGNATURE)
        if name == MANIFEST or signed is not None
    ]
    files += [
        bundle_rows.StoredFile(file.path, file.sha256, file.size_bytes)
        for file in bundle.manifest.files
    ]
    return bundle_rows.NewBundle(
        sha256=bundle.digest,
        size_bytes=bundle.size_bytes,
        signature=bundle_rows.input_signature(bundle.manifest),
        files=tuple(files),
        signed=signed,
    )


def _disk_error(error: OSError) -> BaseException:
    """Return what a failure of the store's disk is to the client."""
    if disk_full(error):
        return ResourceExhausted(
            "the disk of the store is full; nothing was stored. Free some space and try again",
            reason="DISK_FULL",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return FailedPrecondition(
            f"the store cannot be written: {error.strerror}; nothing was stored. Mount its disk "
            "for writing, or give the manager's user the right to write it",
            reason="STORE_READ_ONLY",
        )
    return error
