"""Tensors in shared memory: regions that clients register, and the bytes in them.

Regions are read and written with system calls, not through a mapping: a client that shrinks the
memory object under a mapping kills the process that touches it; a read only comes back short. The
price is one copy, which also means that a client cannot change a tensor after it was checked.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.inference.errors import (
    FeatureNotOffered,
    RegionExists,
    RegionFailed,
    RegionUnknown,
    RequestInvalid,
)

_FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory objects


@dataclass(eq=False)
class Region:
    """A part of a shared memory object, open as long as it is registered or used."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int
    users: int = field(default=0, init=False)
    forgotten: bool = field(default=False, init=False)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes that start `offset` bytes into the region.

        Raises:
            RequestInvalid: they are not all within the region.
            RegionFailed: the memory object has become smaller.
        """
        self.check(offset, size)
        data = os.pread(self.descriptor, size, self.offset + offset)
        if len(data) != size:
            raise self._gone(offset, size)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Put `data` `offset` bytes into the region; the caller has checked the range.

        Raises:
            RegionFailed: the memory object has become smaller, or memory is short.
        """
        self.check(offset, len(data))
        end = self.offset + offset + len(data)
        if os.fstat(self.descriptor).st_size < end:
            raise self._gone(offset, len(data))
        try:
            written = os.pwrite(self.descriptor, data, self.offset + offset)
        except OSError as error:
            raise RegionFailed(
                f"cannot write to shared memory region '{self.name}': {error.strerror}",
                region=self.name,
            ) from error
        if written != len(data):
            raise self._gone(offset, len(data))

    def check(self, offset: int, size: int) -> None:
        """Check that a range lies within the region.

        Raises:
            RequestInvalid: it does not.
        """
        if not 0 <= offset <= self.byte_size:
            raise RequestInvalid(
                f"Invalid offset for shared memory region: '{self.name}': {offset} is not within "
                f"its {self.byte_size} bytes",
                region=self.name,
                offset=offset,
            )
        if not 0 <= size <= self.byte_size - offset:
            raise RequestInvalid(
                f"Invalid offset + byte size for shared memory region: '{self.name}': {size} bytes "
                f"from {offset} on are not within its {self.byte_size} bytes",
                region=self.name,
                byte_size=size,
            )

    def _gone(self, offset: int, size: int) -> RegionFailed:
        return RegionFailed(
            f"shared memory region '{self.name}' no longer holds {size} bytes from {offset} on: "
            f"the object '{self.key}' has become smaller since it was registered",
            region=self.name,
        )


class SharedMemory:
    """The regions that clients have registered. May be used on any thread."""

    def __init__(self, *, enabled: bool) -> None:
        """Start without regions.

        Args:
            enabled: Whether clients may register any: they name objects of this machine that the
                server then reads and writes with its own rights.
        """
        self.enabled = enabled
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open a region of the object `key`.

        Raises:
            FeatureNotOffered: shared memory is off.
            RegionExists: the name is taken.
            RegionFailed: there is no such object.
            RequestInvalid: the region is empty, or not within the object.
        """
        self.require()
        if name in self._regions:
            raise _taken(name)
        if not name:
            raise RequestInvalid("a shared memory region needs a name")
        descriptor = _open(key)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise RegionFailed(f"Unable to open shared memory region: '{key}'", key=key)
            if byte_size <= 0 or offset > status.st_size or byte_size > status.st_size - offset:
                raise RequestInvalid(
                    f"failed to register shared memory region '{name}': invalid args: {byte_size} "
                    f"bytes from {offset} on are not within the {status.st_size} bytes of '{key}'",
                    region=name,
                )
        except BaseException:
            os.close(descriptor)
            raise
        region = Region(name, key, offset, byte_size, descriptor)
        with self._lock:
            if self._regions.setdefault(name, region) is region:
                return
        os.close(descriptor)
        raise _taken(name)

    def status(self, name: str) -> list[pb.SystemSharedMemoryStatusResponse.RegionStatus]:
        """Describe one region, or all of them if the name is empty.

        Raises:
            FeatureNotOffered: shared memory is off.
            RegionUnknown: there is no such region.
        """
        self.require()
        with self._lock:
            regions = [self._find(name)] if name else list(self._regions.values())
        return [
            pb.SystemSharedMemoryStatusResponse.RegionStatus(
                name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
            )
            for region in regions
        ]

    def unregister(self, name: str) -> None:
        """Forget one region, or all of them if the name is empty.

        Requests that use it already go on to do so.
        """
        self.require()
        with self._lock:
            for each in [name] if name else list(self._regions):
                region = self._regions.pop(each, None)
                if region is not None:
                    region.forgotten = True
                    _close_if_idle(region)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Region]:
        """Keep a region open while it is used.

        Raises:
            FeatureNotOffered: shared memory is off.
            RegionUnknown: there is no such region.
        """
        self.require()
        with self._lock:
            region = self._find(name)
            region.users += 1
        try:
            yield region
        finally:
            with self._lock:
                region.users -= 1
                _close_if_idle(region)

    def close(self) -> None:
        """Forget all regions."""
        if self.enabled:
            self.unregister("")

    def require(self) -> None:
        """Check that shared memory is on.

        Raises:
            FeatureNotOffered: it is off.
        """
        if not self.enabled:
            raise FeatureNotOffered(
                "shared memory is off on this server; send raw contents, or start the server with "
                "--shared-memory if every client on its machine is trusted"
            )

    def _find(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise RegionUnknown(
                f"Unable to find system shared memory region: '{name}'", region=name
            )
        return region


def _taken(name: str) -> RegionExists:
    return RegionExists(f"shared memory region '{name}' already in manager", region=name)


def _open(key: str) -> int:
    name = key.removeprefix("/")
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise RegionFailed(
            f"Unable to open shared memory region: '{key}': not the name of an object", key=key
        )
    try:
        return os.open(_FOLDER / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RegionFailed(
            f"Unable to open shared memory region: '{key}': {reason}", key=key
        ) from None


def _close_if_idle(region: Region) -> None:
    if region.forgotten and region.users == 0 and region.descriptor >= 0:
        os.close(region.descriptor)
        region.descriptor = -1
