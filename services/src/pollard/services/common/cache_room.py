"""The limit on what a server's bundles take of its disk.

Room is made before a bundle is fetched, once its manifest says how large it is: bundles that are
neither in use nor about to be go, those used longest ago first. What is being fetched counts with
its whole size from then on, so that fetches at the same time do not exceed the limit together.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from pollard.services.common.errors import ResourceExhausted

if TYPE_CHECKING:
    from pollard.services.common.bundle_cache import BundleCache

_log = structlog.get_logger("pollard.cache")


class CacheRoom:
    """Keeps a cache within a limit. May be used from any thread.

    Args:
        cache: Whose bundles count, and are removed.
        max_bytes: The limit.
    """

    def __init__(self, cache: BundleCache, max_bytes: int) -> None:
        self._cache = cache
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._reserved: dict[str, int] = {}

    def reserve(self, name: str, digest: str, size_bytes: int) -> None:
        """Make room for a bundle that is about to be fetched.

        Args:
            name: Of what is fetched, for `release`.
            digest: The bundle's.
            size_bytes: What it will take.

        Raises:
            ResourceExhausted: the limit leaves no room for it; nothing was removed.
        """
        with self._lock:
            self._reserved.pop(name, None)
            most = self._max_bytes
            if size_bytes > most:
                raise ResourceExhausted(
                    f"the bundle {digest} takes {size_bytes} bytes, and the cache is limited to "
                    f"{most}; give the server a larger --cache-bytes",
                    reason="CACHE_LIMIT",
                    digest=digest,
                    size_bytes=size_bytes,
                    limit_bytes=most,
                )
            taken = self._taken()
            unused = {path: _size(path) for path in self._cache.unused()}
            needed = taken - sum(unused.values())
            if needed + size_bytes > most:
                raise ResourceExhausted(
                    f"the bundle {digest} takes {size_bytes} bytes, and of the {most} that the "
                    f"cache may have, {needed} are taken by bundles in use or being fetched; give "
                    f"the server a --cache-bytes of {needed + size_bytes} or more, or take a "
                    "revision out of service first",
                    reason="CACHE_LIMIT",
                    digest=digest,
                    size_bytes=size_bytes,
                    limit_bytes=most,
                    needed_bytes=needed + size_bytes,
                )
            self._evict(unused, taken + size_bytes - most)
            self._reserved[name] = size_bytes

    def release(self, name: str) -> None:
        """Count what was fetched by what lies on the disk, or no more."""
        with self._lock:
            self._reserved.pop(name, None)

    def trim(self) -> None:
        """Remove unused bundles until the rest is within the limit."""
        with self._lock:
            unused = {path: _size(path) for path in self._cache.unused()}
            self._evict(unused, self._taken() - self._max_bytes)

    def _evict(self, unused: dict[Path, int], excess: int) -> None:
        for path, size in unused.items():
            if excess <= 0:
                return
            _log.info("removing a bundle to make room", digest=path.name, size_bytes=size)
            self._cache.discard_folder(path)
            excess -= size

    def _taken(self) -> int:
        return sum(map(_size, self._cache.folders())) + sum(self._reserved.values())


def _size(folder: Path) -> int:
    """Return the size of the files in a folder; 0 if it has gone."""
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(directory, name)).st_size
            except FileNotFoundError:
                continue
    return total
