"""URLs by which servers get blobs from S3 themselves, for a short time.

Signing is arithmetic with the manager's keys: S3 is not asked. A URL is handed out again while at
least half of its time is left, so that many servers that want the same bundle cost little more than
one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping

import fsspec.asyn
from s3fs import S3FileSystem

from pollard.services.models.blobs import BlobUrl

_SIGN_SECONDS = 10.0
"""Longest time for signing: the first time keys may be fetched from the machine's metadata."""

_MOST_KEPT = 4096


class Presigner:
    """Makes URLs for GET. May be used from any thread.

    Args:
        files: Reaches S3 as those who get the URLs do.
        bucket: Holds the blobs.
        seconds: How long a URL is good.
    """

    def __init__(self, files: S3FileSystem, bucket: str, seconds: float) -> None:
        self._files = files
        self._bucket = bucket
        self._seconds = seconds
        self._kept: dict[str, BlobUrl] = {}
        self._lock = threading.Lock()

    def sign(self, keys: Mapping[str, str]) -> dict[str, BlobUrl]:
        """Return URLs of objects, by the same names.

        Args:
            keys: Keys in the bucket, by any names.

        Raises:
            Exception: there are no keys to sign with, or they cannot be had now.
        """
        now = time.time()
        with self._lock:
            found = {
                name: self._kept[key]
                for name, key in keys.items()
                # A clock that was set back must not keep one for ever.
                if key in self._kept
                and self._seconds / 2 <= self._kept[key].expires - now <= self._seconds
            }
        missing = {name: key for name, key in keys.items() if name not in found}
        if not missing:
            return found

        async def sign_all() -> list[str]:
            async with asyncio.timeout(_SIGN_SECONDS):
                return [
                    await self._files._url(f"{self._bucket}/{key}", expires=int(self._seconds))
                    for key in missing.values()
                ]

        signed: list[str] = fsspec.asyn.sync(self._files.loop, sign_all)
        made = {
            name: BlobUrl(url, now + int(self._seconds))
            for name, url in zip(missing, signed, strict=True)
        }
        with self._lock:
            if len(self._kept) > _MOST_KEPT:
                self._kept = {key: kept for key, kept in self._kept.items() if kept.expires > now}
            if len(self._kept) > _MOST_KEPT:
                self._kept.clear()
            self._kept.update({missing[name]: url for name, url in made.items()})
        return found | made
