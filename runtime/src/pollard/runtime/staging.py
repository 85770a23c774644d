"""Memory of the host through which batches go to and from a device."""

from __future__ import annotations

import ctypes
import weakref
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pollard.runtime import cuda
from pollard.runtime.errors import DeviceFault, ModelLoadFailed

Bytes = NDArray[np.uint8]

_ALIGNMENT = 64
_MOST_HELD_BYTES = 256 << 10
"""Of what is copied with the GIL held."""
_PORTABLE = 1
"""cudaHostAllocPortable: pinned for all GPUs."""


class Staging(Protocol):
    """Where staging buffers come from, and how they are copied."""

    def allocate(self, size: int) -> Bytes:
        """Return `size` bytes, which live as long as the array or a view of it."""

    def upload(self, address: int, data: Bytes) -> None:
        """Copy bytes to an address on the device; returns when that is done."""

    def download(self, data: Bytes, address: int) -> None:
        """Copy bytes from an address on the device; returns when that is done."""


class PageableStaging:
    """Plain memory: what a processor needs, and what is left where none can be pinned."""

    def allocate(self, size: int) -> Bytes:
        """Return zeros that begin at a multiple of a cache line."""
        raw = np.zeros(size + _ALIGNMENT, np.uint8)
        skip = -raw.ctypes.data % _ALIGNMENT
        return raw[skip : skip + size]

    def upload(self, address: int, data: Bytes) -> None:
        """Copy, where the device is the processor."""
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def download(self, data: Bytes, address: int) -> None:
        """Copy, where the device is the processor."""
        ctypes.memmove(data.ctypes.data, address, data.nbytes)


class PinnedStaging:
    """Memory that the GPU reads and writes by itself, twice as fast as through a copy."""

    def __init__(self, device_id: int) -> None:
        """Pin memory for one GPU.

        Raises:
            ProviderMissing: libcudart is not there.
        """
        self._device_id = device_id
        self._runtime = cuda.Runtime.get()
        self._plain = PageableStaging()

    def allocate(self, size: int) -> Bytes:
        """Return pinned zeros; plain ones if no more memory can be pinned."""
        pointer = ctypes.c_void_p()
        try:
            self._runtime.call("cudaSetDevice", self._device_id)
            self._runtime.call("cudaHostAlloc", ctypes.byref(pointer), size, _PORTABLE)
        except DeviceFault:
            # A limit on locked memory: slower, but right.
            return self._plain.allocate(size)
        assert pointer.value is not None  # noqa: S101 - it succeeded
        owner = (ctypes.c_uint8 * size).from_address(pointer.value)
        # Views keep the owner, and so the memory. Not at exit: CUDA may have gone by then.
        weakref.finalize(owner, _free, self._runtime, pointer.value).atexit = False
        array: Bytes = np.ctypeslib.as_array(owner)
        array[:] = 0
        return array

    def upload(self, address: int, data: Bytes) -> None:
        """Copy to the GPU."""
        self._copy(address, data.ctypes.data, data.nbytes, cuda.HOST_TO_DEVICE)

    def download(self, data: Bytes, address: int) -> None:
        """Copy from the GPU."""
        self._copy(data.ctypes.data, address, data.nbytes, cuda.DEVICE_TO_HOST)

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        self._runtime.use(self._device_id)
        self._runtime.call("cudaMemcpy", target, source, size, kind)


def lay(memory: memoryview, start: int, array: NDArray[np.generic]) -> int:
    """Copy an array's bytes to a place in staging memory and return where they end.

    What is copied in some ten microseconds is copied with the GIL held: NumPy lets go of it, and
    where other threads want it, to get it back takes longer than the copy itself.

    Args:
        memory: Bytes.
        start: The first one to write.
        array: Of any layout.
    """
    end = start + array.nbytes
    if array.nbytes <= _MOST_HELD_BYTES and array.flags.c_contiguous:
        memory[start:end] = array.reshape(-1).view(np.uint8).data
    else:
        target = np.frombuffer(memory[start:end], array.dtype).reshape(array.shape)
        target[...] = array
    return end


def taken(
    memory: memoryview, kind: np.dtype[np.generic], shape: tuple[int, ...]
) -> NDArray[np.generic]:
    """Return a copy of what lies at the beginning of staging memory; see `lay` for how.

    Args:
        memory: Bytes.
        kind: Of the array.
        shape: Of the array.
    """
    array = np.empty(shape, kind)
    if array.nbytes <= _MOST_HELD_BYTES:
        array.reshape(-1).view(np.uint8).data[:] = memory[: array.nbytes]
    else:
        array[...] = np.frombuffer(memory[: array.nbytes], kind).reshape(shape)
    return array


def _free(runtime: cuda.Runtime, address: int) -> None:
    try:
        runtime.call("cudaFreeHost", address)
    except DeviceFault:
        # The GPU is lost; the memory goes with the process.
        return


def staging_for(device_id: int) -> Staging:
    """Return pinned memory, or plain memory where libcudart cannot be called."""
    try:
        return PinnedStaging(device_id)
    except (ModelLoadFailed, DeviceFault, AttributeError):
        return PageableStaging()
