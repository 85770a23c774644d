"""Tensors in shared memory: regions that clients register, and the bytes in them.

Regions are read and written with system calls, not through a mapping: a client that shrinks the
memory object under a mapping kills the process that touches it; a read only comes back short. The
price is one copy, which also means that a client cannot change a tensor after it was checked.
Memory of a GPU is copied through the host, too.
"""

from __future__ import annotations

import base64
import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.cuda_memory import HANDLE_BYTES, GpuMemory
from pollard.runtime.errors import DeviceFault, ProviderMissing
from pollard.services.inference.errors import (
    FeatureNotOffered,
    RegionExists,
    RegionFailed,
    RegionUnknown,
    RequestInvalid,
)

_FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory objects

_MOST_DEVICE_ID = 2**31 - 1


@dataclass(eq=False)
class Span:
    """Registered memory of some kind, kept as long as it is registered or used."""

    name: str
    byte_size: int
    users: int = field(default=0, init=False)
    forgotten: bool = field(default=False, init=False)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes that start `offset` bytes into the region.

        Raises:
            RequestInvalid: they are not all within the region.
            RegionFailed: they are not there any more.
        """
        raise NotImplementedError

    def write(self, offset: int, data: bytes) -> None:
        """Put `data` `offset` bytes into the region.

        Raises:
            RequestInvalid: it is not all within the region.
            RegionFailed: it cannot be put there.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the memory; nobody uses it any more."""
        raise NotImplementedError

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


@dataclass(eq=False)
class Region(Span):
    """A part of a shared memory object, open as long as it is registered or used."""

    key: str
    offset: int
    descriptor: int

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

    def release(self) -> None:
        """Close the object."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _gone(self, offset: int, size: int) -> RegionFailed:
        return RegionFailed(
            f"shared memory region '{self.name}' no longer holds {size} bytes from {offset} on: "
            f"the object '{self.key}' has become smaller since it was registered",
            region=self.name,
        )


@dataclass(eq=False)
class CudaRegion(Span):
    """Memory of a GPU that a client shares by its handle."""

    device_id: int
    address: int
    gpu: GpuMemory

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the region; see `Span.read`."""
        self.check(offset, size)
        try:
            return self.gpu.read(self.address + offset, size, self.device_id) if size else b""
        except DeviceFault as error:
            raise self._failed("read", error) from error

    def write(self, offset: int, data: bytes) -> None:
        """Put bytes into the region; see `Span.write`."""
        self.check(offset, len(data))
        try:
            if data:
                self.gpu.write(self.address + offset, data, self.device_id)
        except DeviceFault as error:
            raise self._failed("write", error) from error

    def release(self) -> None:
        """Give the memory back."""
        if self.address:
            self.gpu.close(self.address, self.device_id)
            self.address = 0

    def _failed(self, verb: str, error: DeviceFault) -> RegionFailed:
        return RegionFailed(
            f"cannot {verb} cuda shared memory region '{self.name}': {error.message}; the process "
            "that made it may have ended",
            region=self.name,
        )


def open_cuda_region(
    gpu: GpuMemory, name: str, raw_handle: bytes, device_id: int, byte_size: int
) -> CudaRegion:
    """Open memory of a GPU by its handle, as bytes or in base64; see `register_cuda`."""
    handle = raw_handle
    if len(handle) != HANDLE_BYTES:
        with contextlib.suppress(ValueError):
            handle = base64.b64decode(raw_handle, validate=True)
    refused = f"failed to register CUDA shared memory region '{name}'"
    if len(handle) != HANDLE_BYTES:
        raise RequestInvalid(
            f"{refused}: its handle has {len(raw_handle)} bytes, and a CUDA handle has "
            f"{HANDLE_BYTES}",
            region=name,
        )
    # Its highest bits would be cut off on the way to CUDA, which takes an int.
    if not 0 <= device_id <= _MOST_DEVICE_ID or byte_size <= 0:
        raise RequestInvalid(
            f"{refused}: invalid args: {byte_size} bytes on GPU {device_id}", region=name
        )
    try:
        address, size = gpu.open(handle, device_id)
    except (DeviceFault, ProviderMissing) as error:
        raise RegionFailed(
            f"{refused}: failed to open CUDA IPC handle: {error.message}", region=name
        ) from error
    region = CudaRegion(name, byte_size, device_id, address, gpu)
    if byte_size > size:
        region.release()
        raise RequestInvalid(
            f"{refused}: invalid args: {byte_size} bytes are not within the {size} bytes of the "
            "memory",
            region=name,
        )
    return region


class SharedMemory:
    """The regions that clients have registered. May be used on any thread."""

    def __init__(self, *, enabled: bool, gpu: GpuMemory | None = None) -> None:
        """Start without regions.

        Args:
            enabled: Whether clients may register any: they name objects of this machine that the
                server then reads and writes with its own rights.
            gpu: How memory of GPUs is reached; None if there is none.
        """
        self.enabled = enabled
        self._gpu = gpu
        self._regions: dict[str, Span] = {}
        self._lock = threading.Lock()

    @property
    def has_gpu(self) -> bool:
        """Whether memory of GPUs can be registered."""
        return self._gpu is not None

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
        self._add(Region(name, byte_size, key, offset, descriptor))

    def register_cuda(self, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        """Open memory of a GPU by its CUDA handle.

        Raises:
            FeatureNotOffered: shared memory is off, or there is no GPU.
            RegionExists: the name is taken.
            RegionFailed: the handle names no memory.
            RequestInvalid: the handle is none, or the region is empty or larger than the memory.
        """
        if self._gpu is None:
            raise FeatureNotOffered(
                f"failed to register CUDA shared memory region: '{name}', GPUs not supported",
                region=name,
            )
        self.require()
        if name in self._regions:
            raise _taken(name)
        if not name:
            raise RequestInvalid("a shared memory region needs a name")
        self._add(open_cuda_region(self._gpu, name, raw_handle, device_id, byte_size))

    def cuda_status(self, name: str) -> list[pb.CudaSharedMemoryStatusResponse.RegionStatus]:
        """Describe one region of GPU memory, or all of them if the name is empty.

        Raises:
            FeatureNotOffered: shared memory is off.
            RegionUnknown: there is no such region.
        """
        self.require()
        with self._lock:
            regions = [each for each in self._regions.values() if isinstance(each, CudaRegion)]
        found = [each for each in regions if name in ("", each.name)]
        if name and not found:
            raise RegionUnknown(f"Unable to find cuda shared memory region: '{name}'", region=name)
        return [
            pb.CudaSharedMemoryStatusResponse.RegionStatus(
                name=region.name, device_id=region.device_id, byte_size=region.byte_size
            )
            for region in found
        ]

    def _add(self, region: Span) -> None:
        with self._lock:
            if self._regions.setdefault(region.name, region) is region:
                return
        region.release()
        raise _taken(region.name)

    def status(self, name: str) -> list[pb.SystemSharedMemoryStatusResponse.RegionStatus]:
        """Describe one region, or all of them if the name is empty.

        Raises:
            FeatureNotOffered: shared memory is off.
            RegionUnknown: there is no such region.
        """
        self.require()
        with self._lock:
            given = [self._find(name)] if name else list(self._regions.values())
        regions = [region for region in given if isinstance(region, Region)]
        if name and not regions:
            raise _unknown(name)
        return [
            pb.SystemSharedMemoryStatusResponse.RegionStatus(
                name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
            )
            for region in regions
        ]

    def unregister(self, name: str, kind: type[Span] = Region) -> None:
        """Forget one region of a kind, or all of them if the name is empty.

        Requests that use it already go on to do so.
        """
        self.require()
        with self._lock:
            for each in [name] if name else list(self._regions):
                region = self._regions.get(each)
                if isinstance(region, kind):
                    del self._regions[each]
                    region.forgotten = True
                    _close_if_idle(region)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Span]:
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
            self.unregister("", Span)

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

    def _find(self, name: str) -> Span:
        region = self._regions.get(name)
        if region is None:
            raise _unknown(name)
        return region


def _unknown(name: str) -> RegionUnknown:
    return RegionUnknown(f"Unable to find system shared memory region: '{name}'", region=name)


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


def _close_if_idle(region: Span) -> None:
    if region.forgotten and region.users == 0:
        region.release()
