"""Where a server gets bundles from: its cache, else the manager, or where the manager says."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog

from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import model_service_pb2 as models_pb
from pollard.models.v1 import model_service_pb2_grpc as models_grpc
from pollard.runtime.bundle import MANIFEST, MAX_SIGNATURE_BYTES, SIGNATURE, write_durably
from pollard.runtime.disk import disk_full
from pollard.runtime.errors import BundleError
from pollard.services.common.auth.own import Pairs
from pollard.services.common.bundle_cache import BundleCache, Staging
from pollard.services.common.direct_fetch import (
    DirectFetch,
    DirectFetchFailed,
    FetchLimits,
    RemoteFile,
)
from pollard.services.common.errors import (
    DataLoss,
    FailedPrecondition,
    Internal,
    NotFound,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)

_log = structlog.get_logger("pollard.bundles")

_ATTEMPTS = 4
_SILENCE_SECONDS = 30.0
"""Longest wait for the next piece of a download."""

_MANAGER_ONLY_SECONDS = 60.0
"""How long the manager is asked for the bytes after what it named could not be reached."""

_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


class BundleSource:
    """Hands out bundles by digest, each fetched at most once at a time."""

    def __init__(
        self,
        cache: BundleCache,
        channel: Callable[[], grpc.aio.Channel | None],
        shows: Callable[[], Pairs] = tuple,
        limits: FetchLimits | None = None,
    ) -> None:
        """Fetch into `cache`.

        Args:
            cache: Where bundles lie.
            channel: Returns the channel to the manager; None means no manager.
            shows: Returns the metadata that tells the manager who asks.
            limits: How patient fetches from other places are.
        """
        self._cache = cache
        self._channel = channel
        self._shows = shows
        self._direct = DirectFetch(limits)
        self._manager_only_until = 0.0
        self._fetching: dict[tuple[str, bool], asyncio.Task[Path]] = {}

    def cached(self, digest: str) -> bool:
        """Whether the whole bundle is in the cache."""
        return self._cache.bundle_path(digest).is_dir()

    async def fetch(self, digest: str) -> Path:
        """Return the folder of a whole bundle.

        What lies in the cache is not checked again here: whoever loads it does.

        Raises:
            NotFound: the manager has no such bundle.
            Unavailable: it is not in the cache and the manager cannot be reached.
            DataLoss: what the manager sent does not have the digest.
            ResourceExhausted: the disk is full, or the cache is.
            FailedPrecondition: the cache cannot be written.
        """
        return await self._get(digest, whole=True)

    async def fetch_description(self, digest: str) -> Path:
        """Return a folder with the bundle's manifest and labels, and nothing else.

        Raises:
            ServiceError: as `fetch`.
        """
        return await self._get(digest, whole=False)

    async def discard(self, digest: str) -> None:
        """Remove a bundle that was found to be damaged; the next `fetch` gets it anew.

        Raises:
            FailedPrecondition: the cache cannot be written.
        """
        try:
            await asyncio.to_thread(self._cache.discard, digest)
        except OSError as error:
            raise cache_fault(error, digest) from error

    def close(self) -> None:
        """Fetch nothing more from other places than the manager."""
        self._direct.close()

    async def refresh_signature(self, digest: str) -> bool:
        """Get the signature of a cached bundle anew: it may have been signed since.

        Returns:
            Whether it has another one now. False as well when the manager cannot be asked.

        Raises:
            DataLoss: what the manager sent is too long to be one.
            ResourceExhausted: the disk is full.
        """
        channel = self._channel()
        if channel is None:
            return False
        content = bytearray()
        request = models_pb.DownloadBundleRequest(bundle_sha256=digest, paths=[SIGNATURE])
        call: Any = models_grpc.ModelServiceStub(channel).DownloadBundle(
            request, timeout=_SILENCE_SECONDS, metadata=self._shows()
        )
        try:
            async for piece in call:
                if piece.path == SIGNATURE:
                    content += piece.data
                if len(content) > MAX_SIGNATURE_BYTES:
                    raise DataLoss(
                        f"the manager sent a signature of more than {MAX_SIGNATURE_BYTES} bytes",
                        reason="BUNDLE_CORRUPT",
                        digest=digest,
                    )
            path = self._cache.bundle_path(digest) / SIGNATURE
            return await asyncio.to_thread(_replace, path, bytes(content))
        except grpc.aio.AioRpcError as error:
            _log.info("no new signature", digest=digest, why=error.details())
            return False
        except OSError as error:
            raise _translated(error, digest) from error
        finally:
            call.cancel()

    async def _get(self, digest: str, *, whole: bool) -> Path:
        cache = self._cache
        path = cache.bundle_path(digest) if whole else cache.description_path(digest)
        if await asyncio.to_thread(path.is_dir):
            await asyncio.to_thread(cache.used, digest)
            return path
        key = (digest, whole)
        task = self._fetching.get(key)
        if task is None:
            task = asyncio.create_task(self._download(digest, whole=whole))
            self._fetching[key] = task
            task.add_done_callback(lambda _: self._fetching.pop(key, None))
        # Shielded: another caller may wait for the same bundle.
        return await asyncio.shield(task)

    async def _download(self, digest: str, *, whole: bool) -> Path:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._download_once(digest, whole=whole)
            except Unavailable as error:
                if attempt == _ATTEMPTS or self._channel() is None:
                    raise
                _log.warning("download failed; trying again", digest=digest, error=error.message)
                await asyncio.sleep(0.2 * 2**attempt * random.uniform(0.8, 1.2))
        raise AssertionError("unreachable")

    async def _download_once(self, digest: str, *, whole: bool) -> Path:
        channel = self._channel()
        if channel is None:
            raise Unavailable(
                f"bundle {digest} is not in the cache and no manager is configured",
                reason="BUNDLE_UNAVAILABLE",
                digest=digest,
            )
        staging = None
        try:
            staging = await asyncio.to_thread(self._cache.stage, digest, whole=whole)
            if whole:
                await self._receive(channel, digest, (), staging)
            else:
                await self._receive(channel, digest, (MANIFEST,), staging)
                labels = _labels_file(staging.manifest)
                if labels:
                    await self._receive(channel, digest, (labels,), staging)
            return await asyncio.to_thread(staging.commit)
        except BaseException as error:
            if staging is not None:
                staging.abort()
            raise _translated(error, digest) from error

    async def _receive(
        self, channel: grpc.aio.Channel, digest: str, paths: Sequence[str], staging: Staging
    ) -> None:
        """Get files into `staging`: by the URLs that the manager gives, else from itself."""
        direct = time.monotonic() >= self._manager_only_until
        elsewhere = await self._ask(channel, digest, paths, staging, urls=direct)
        renewed = ""
        while elsewhere:
            file = next(iter(elsewhere.values()))

            def take(offset: int, data: bytes, file: RemoteFile = file) -> None:
                staging.add(file.path, offset, data, file.size_bytes)

            try:
                await self._direct.fetch(file, take)
                del elsewhere[file.path]
                continue
            except DirectFetchFailed as error:
                if error.refused and renewed != file.path:
                    # Its time may be over, after all the files before it.
                    renewed = file.path
                    elsewhere = await self._renew(channel, digest, elsewhere, staging)
                    continue
                _log.warning(
                    "a file cannot be fetched where the manager says; it has to send it",
                    digest=digest,
                    path=file.path,
                    error=error.message,
                )
                unreachable = error.unreachable
            await asyncio.to_thread(staging.restart, file.path)
            if unreachable:
                self._manager_only_until = time.monotonic() + _MANAGER_ONLY_SECONDS
                await self._ask(channel, digest, list(elsewhere), staging, urls=False)
                return
            await self._ask(channel, digest, [file.path], staging, urls=False)
            del elsewhere[file.path]

    async def _renew(
        self,
        channel: grpc.aio.Channel,
        digest: str,
        files: Mapping[str, RemoteFile],
        staging: Staging,
    ) -> dict[str, RemoteFile]:
        """Ask for other URLs of files, of which the first may be there in part."""
        first = next(iter(files.values()))
        found = await self._ask(
            channel, digest, list(files), staging, urls=True, partial=first.path
        )
        if (again := found.get(first.path)) is not None:
            again.received, again.digest = first.received, first.digest
        return found

    async def _ask(
        self,
        channel: grpc.aio.Channel,
        digest: str,
        paths: Sequence[str],
        staging: Staging,
        *,
        urls: bool,
        partial: str = "",
    ) -> dict[str, RemoteFile]:
        """Have the manager send files; return those for which it gave URLs instead, in order.

        Args:
            channel: Leads to the manager.
            digest: The bundle's.
            paths: The files; empty for all.
            staging: Takes what is sent.
            urls: Whether URLs will do.
            partial: A file of which something is there already.
        """
        request = models_pb.DownloadBundleRequest(
            bundle_sha256=digest, paths=paths, accept_urls=urls
        )
        call: Any = models_grpc.ModelServiceStub(channel).DownloadBundle(
            request, metadata=self._shows()
        )
        # The manifest comes with everything, and is here already.
        unwanted = staging.manifest is not None and MANIFEST not in paths
        elsewhere: dict[str, RemoteFile] = {}
        try:
            while True:
                async with asyncio.timeout(_SILENCE_SECONDS):
                    piece = await call.read()
                if piece is grpc.aio.EOF:
                    return elsewhere
                if unwanted and piece.path == MANIFEST:
                    continue
                if urls and piece.url:
                    elsewhere[piece.path] = RemoteFile(
                        piece.path, piece.total_bytes, piece.sha256, piece.url
                    )
                    continue
                if piece.path == partial and piece.offset == 0:
                    await asyncio.to_thread(staging.restart, partial)
                await asyncio.to_thread(
                    staging.add, piece.path, piece.offset, piece.data, piece.total_bytes
                )
        finally:
            call.cancel()


def _replace(path: Path, content: bytes) -> bool:
    if path.is_file() and path.read_bytes() == content:
        return False
    write_durably(path, content)
    return True


def _labels_file(manifest: bundle_pb2.Manifest | None) -> str:
    return manifest.postprocess.labels_file if manifest is not None else ""


def _translated(error: BaseException, digest: str) -> BaseException:
    """Return the error as the callers of `fetch` know it."""
    if isinstance(error, BundleError):
        return DataLoss(
            f"the manager sent a damaged bundle {digest}: {error.message}",
            reason=error.reason,
            **{**error.metadata, "digest": digest},
        )
    if disk_full(error):
        return ResourceExhausted(
            f"the disk is full; bundle {digest} cannot be stored in the cache. Free some space",
            reason="DISK_FULL",
            digest=digest,
        )
    if isinstance(error, TimeoutError):
        return Unavailable(
            f"the manager sent nothing of bundle {digest} for {_SILENCE_SECONDS:g} s",
            reason="BUNDLE_UNAVAILABLE",
            digest=digest,
        )
    if isinstance(error, grpc.aio.AioRpcError):
        words = f"bundle {digest} cannot be fetched: {error.details()}"
        if error.code() in _PASSING:
            return Unavailable(words, reason="BUNDLE_UNAVAILABLE", digest=digest)
        if error.code() == grpc.StatusCode.NOT_FOUND:
            return NotFound(words, reason="BUNDLE_UNKNOWN", digest=digest)
        return Internal(words, reason="BUNDLE_UNAVAILABLE", digest=digest)
    if isinstance(error, OSError):
        return cache_fault(error, digest)
    return error


def cache_fault(error: OSError, digest: str) -> ServiceError:
    """Return what an error of the cache's disk or folders means for a bundle."""
    return FailedPrecondition(
        f"bundle {digest} cannot be kept in the cache, or read from it: {error}",
        reason="CACHE_FAULT",
        digest=digest,
    )
