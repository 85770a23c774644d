"""Uploads: bytes to disk, whole and checked into the registry, or not at all.

What arrives lies in ``uploads/{id}.part`` and can be resumed, after a kill too.
The tar is unpacked and checked in a child, from its first bytes on; its files
then become blobs, and one transaction makes them a revision. Only after that the
client gets its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import math
import os
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import delete
from sqlalchemy.orm import Session

from pollard.runtime.bundle import MANIFEST, SIGNATURE, Bundle
from pollard.runtime.digests import sha256_file
from pollard.runtime.signing import Signature
from pollard.services.common.errors import (
    Conflict,
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    OutOfRange,
    ResourceExhausted,
)
from pollard.services.models import aliases, registry, signatures
from pollard.services.models.blobs import Blobs, remove_leftovers
from pollard.services.models.checks import Check, CheckLimits
from pollard.services.models.events import DAY_US
from pollard.services.models.schema import BundleFile, Revision, Upload
from pollard.services.models.signatures import SignaturePolicy
from pollard.services.models.store import Store, now_us

MAX_CHUNK_BYTES = 4 * 1024 * 1024
_WRITE_BYTES = 4 * 1024 * 1024
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
    sha256: str
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
        limits: What checking a bundle may use.
        max_bundle_bytes: Largest tar.
        parallel_checks: Children that check at the same time; as many unpack
            what is still arriving.
        policy: What is asked of signatures.
    """

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        *,
        limits: CheckLimits,
        max_bundle_bytes: int,
        parallel_checks: int = 2,
        policy: SignaturePolicy | None = None,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._limits = limits
        self._policy = policy or SignaturePolicy()
        self._max_bundle_bytes = max_bundle_bytes
        self._checking = asyncio.Semaphore(parallel_checks)
        self._unpacking = asyncio.Semaphore(parallel_checks)
        self._running: dict[str, _Running] = {}

    def part(self, upload_id: str) -> Path:
        """Return where the bytes of an upload are kept until it is whole."""
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
                return await asyncio.to_thread(_synced_size, self.part(upload_id))
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
        try:
            self._check_room(request)
            async with self._unpack_early(request) as check:
                await self._receive_bytes(request, chunks)
                return await self._make_revision(request, check, actor)
        except BaseException as error:
            if _is_final(error):
                await self._forget(request.upload_id)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(
                    "the disk of the store is full; nothing was stored. Free some space and try "
                    "again",
                    reason="DISK_FULL",
                ) from error
            raise

    def _check_room(self, request: UploadRequest) -> None:
        part = self.part(request.upload_id)
        committed = part.stat().st_size if part.exists() else 0
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
        # The tar and its files are on disk together for a moment.
        if free < missing + request.total_bytes:
            raise ResourceExhausted(
                f"the store has {free} bytes free, the upload needs "
                f"{missing + request.total_bytes}; free some space and try again",
                reason="DISK_FULL",
                free_bytes=free,
                needed_bytes=missing + request.total_bytes,
            )

    @contextlib.asynccontextmanager
    async def _unpack_early(self, request: UploadRequest) -> AsyncGenerator[Check | None]:
        """Unpack a large upload while it arrives; None for a small one.

        Unpacking has slots of its own, because an upload may be slow or hang;
        without a free one the child starts when the upload is whole.
        """
        large = request.total_bytes - request.write_offset >= _EARLY_BYTES
        if not large or self._unpacking.locked():
            yield None
            return
        async with self._unpacking:
            self.part(request.upload_id).touch()
            check = self._new_check(request)
            try:
                yield check
            finally:
                await check.end()

    def _new_check(self, request: UploadRequest) -> Check:
        directory = self._store.staging / f"{request.upload_id}-{secrets.token_hex(4)}"
        return Check(
            self.part(request.upload_id),
            request.total_bytes,
            directory,
            self._limits,
            self._policy.trusted,
        )

    async def _receive_bytes(self, request: UploadRequest, chunks: AsyncIterator[bytes]) -> None:
        writer = _Writer(self.part(request.upload_id), request.total_bytes)
        await asyncio.to_thread(writer.open)
        try:
            async for chunk in chunks:
                await writer.write(chunk)
            await writer.flush()
        finally:
            # A whole tar is unpacked right away, and its files reach the disk then;
            # what broke off must itself be there for the rest.
            await writer.close(sync=writer.size < request.total_bytes)
        if writer.size < request.total_bytes:
            raise InvalidRequest(
                f"the stream ended after {writer.size} of {request.total_bytes} bytes; go on from "
                "there",
                reason="UPLOAD_INCOMPLETE",
                committed_bytes=writer.size,
                total_bytes=request.total_bytes,
            )
        actual = writer.digest.hexdigest()
        if actual != request.sha256:
            raise DataLoss(
                f"the bytes were damaged on the way: their SHA-256 is {actual}, the header says "
                f"{request.sha256}. Upload again from 0",
                reason="DIGEST_MISMATCH",
                expected=request.sha256,
                actual=actual,
            )

    async def _make_revision(
        self, request: UploadRequest, early: Check | None, actor: str
    ) -> Uploaded:
        async with contextlib.AsyncExitStack() as stack:
            async with self._checking:
                check = early
                if check is None:
                    check = self._new_check(request)
                    stack.push_async_callback(check.end)
                signature = await check.verdict()
            warnings = self._policy.judge(signature)
            bundle = await asyncio.to_thread(_read_bundle, check.directory, signature)
            uploaded = await self._store_bundle(request, bundle, check.directory, actor)
            for warning in warnings:
                _log.warning(
                    "accepted with a warning",
                    model=uploaded.model,
                    revision=uploaded.revision,
                    warning=warning,
                )
            uploaded = replace(uploaded, warnings=warnings)
        self.part(request.upload_id).unlink(missing_ok=True)
        return uploaded

    async def _store_bundle(
        self, request: UploadRequest, bundle: registry.NewBundle, staging: Path, actor: str
    ) -> Uploaded:
        digests = {file.sha256 for file in bundle.files}
        try:
            with self._blobs.pinned(digests):
                await asyncio.to_thread(self._adopt, bundle, staging)
                return await self._store.write(
                    lambda session: _commit(session, request, bundle, actor, self._policy)
                )
        except BaseException:
            await asyncio.to_thread(self._blobs.collect, self._is_referenced, digests)
            raise

    def _adopt(self, bundle: registry.NewBundle, staging: Path) -> None:
        for file in bundle.files:
            self._blobs.adopt(staging / file.path, file.sha256)

    def _is_referenced(self, sha256: str) -> bool:
        return self._store.read_now(
            lambda session: session.query(BundleFile).filter_by(sha256=sha256).first() is not None
        )

    async def _forget(self, upload_id: str) -> None:
        self.part(upload_id).unlink(missing_ok=True)
        # A row without bytes does no harm, should the disk be too full to delete it.
        with contextlib.suppress(ResourceExhausted):
            await self._store.write(
                lambda session: session.execute(
                    delete(Upload).where(Upload.upload_id == upload_id, Upload.revision == 0)
                )
            )

    def clean(self, *, starting: bool = False) -> None:
        """Delete what was abandoned: uploads and staging a day old, blobs without reference.

        Safe beside running uploads.

        Args:
            starting: No upload can be running, because the store was only just
                locked; then what is being checked belongs to nobody, however young.
        """
        day_ago = time.time() - _DAY_SECONDS
        remove_leftovers(self._store.staging, math.inf if starting else day_ago)
        # A running upload changes its file all the time, so its file is never so old.
        remove_leftovers(self._store.uploads, day_ago)

        def forget(session: Session) -> set[str]:
            old = Upload.create_time < now_us() - DAY_US
            for row in session.query(Upload).filter(old):
                if not self.part(row.upload_id).exists():
                    session.delete(row)
            registry.purge_expired(session)
            return {sha256 for (sha256,) in session.query(BundleFile.sha256)}

        known = self._store.write_now(forget)
        self._blobs.collect(lambda sha256: sha256 in known or self._is_referenced(sha256))


class _Writer:
    """Appends to a file and hashes, one block behind the network.

    A block is written while the next one arrives; so no more than two are in memory.
    """

    def __init__(self, path: Path, total_bytes: int) -> None:
        self._path = path
        self._total = total_bytes
        self._file: Any = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._writing: asyncio.Future[None] | None = None
        self.size = 0
        self.digest = hashlib.sha256()

    def open(self) -> None:
        """Open the file and hash what is there."""
        self._file = self._path.open("a+b")
        self._file.seek(0)
        while block := self._file.read(_WRITE_BYTES):
            self.digest.update(block)
            self.size += len(block)

    async def write(self, chunk: bytes) -> None:
        """Take one chunk.

        Raises:
            InvalidRequest: it is too large, or goes beyond the end.
        """
        if len(chunk) > MAX_CHUNK_BYTES:
            raise InvalidRequest(
                f"a chunk of {len(chunk)} bytes is longer than {MAX_CHUNK_BYTES}",
                reason="CHUNK_TOO_LARGE",
                length=len(chunk),
                limit=MAX_CHUNK_BYTES,
            )
        self.size += len(chunk)
        if self.size > self._total:
            raise InvalidRequest(
                f"more than the {self._total} bytes that the header says",
                reason="UPLOAD_TOO_LONG",
                total_bytes=self._total,
            )
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        if self._waiting_bytes >= _WRITE_BYTES:
            await self._write_out()

    async def _write_out(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)
        blocks, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._append, blocks))

    def _append(self, blocks: list[bytes]) -> None:
        for block in blocks:
            self._file.write(block)
            self.digest.update(block)

    async def flush(self) -> None:
        """Write everything that has come."""
        await self._write_out()
        assert self._writing is not None  # noqa: S101 - just set
        await asyncio.shield(self._writing)

    async def close(self, *, sync: bool) -> None:
        """Close, after bringing what was written to the disk if ``sync``; never raises."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
            if not self._writing.cancelled():
                self._writing.exception()  # raised already where it matters
        await asyncio.to_thread(self._close, sync)

    def _close(self, sync: bool) -> None:
        # What cannot be flushed was not acknowledged; the size on disk tells the truth.
        with contextlib.suppress(OSError):
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()


def _is_final(error: BaseException) -> bool:
    """Tell whether trying the same upload again cannot succeed, or the disk is full."""
    if isinstance(error, InvalidRequest):
        return error.reason not in ("UPLOAD_INCOMPLETE", "CHECK_TIMEOUT")
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, (DataLoss, ResourceExhausted))


def _begin(session: Session, request: UploadRequest) -> Uploaded | None:
    """Write an upload down; return its revision if it was completed before."""
    row = session.get(Upload, request.upload_id)
    if row is None:
        session.add(
            Upload(
                upload_id=request.upload_id,
                model=request.model,
                total_bytes=request.total_bytes,
                sha256=request.sha256,
                create_time=now_us(),
            )
        )
        return None
    if (row.model, row.total_bytes, row.sha256) != (
        request.model,
        request.total_bytes,
        request.sha256,
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


def _commit(
    session: Session,
    request: UploadRequest,
    bundle: registry.NewBundle,
    actor: str,
    policy: SignaturePolicy,
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
    row = session.get_one(Upload, request.upload_id)
    row.revision = revision.number
    row.existed = existed
    return Uploaded(request.model, revision.number, existed)


def _read_bundle(directory: Path, signed: Signature | None) -> registry.NewBundle:
    """Return what the registry keeps of a bundle that the child found good."""
    bundle = Bundle.open(directory, verify=False)
    files = [registry.StoredFile(MANIFEST, bundle.digest, (directory / MANIFEST).stat().st_size)]
    signature = directory / SIGNATURE
    if signed is not None:
        files.append(
            registry.StoredFile(SIGNATURE, sha256_file(signature), signature.stat().st_size)
        )
    files += [
        registry.StoredFile(file.path, file.sha256, file.size_bytes)
        for file in bundle.manifest.files
    ]
    return registry.NewBundle(
        sha256=bundle.digest,
        size_bytes=bundle.size_bytes,
        signature=registry.input_signature(bundle.manifest),
        files=tuple(files),
        signed=signed,
    )


def _synced_size(path: Path) -> int:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size
