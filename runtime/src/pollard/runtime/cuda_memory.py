"""Memory of a GPU that another process shares by a handle, read and written through the host."""

from __future__ import annotations

import ctypes
from typing import Protocol

import numpy as np

from pollard.runtime import cuda
from pollard.runtime.device_graphs import running
from pollard.runtime.errors import DeviceFault
from pollard.runtime.staging import PinnedStaging

HANDLE_BYTES = 64
"""Of a `cudaIpcMemHandle_t`."""

_LAZY_PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess, the only flag there is."""


class GpuMemory(Protocol):
    """How shared memory of a GPU is reached. May be used on any thread."""

    def open(self, handle: bytes, device_id: int) -> tuple[int, int]:
        """Map the memory that a handle names; return its address and its size in bytes.

        Raises:
            DeviceFault: there is no such memory, or no such GPU.
            ProviderMissing: there is no CUDA.
        """

    def close(self, address: int, device_id: int) -> None:
        """Give mapped memory back; what cannot be given back is the process's until it ends."""

    def read(self, address: int, size: int, device_id: int) -> bytes:
        """Return bytes from an address.

        Raises:
            DeviceFault: they cannot be read.
        """

    def write(self, address: int, data: bytes, device_id: int) -> None:
        """Put bytes to an address.

        Raises:
            DeviceFault: they cannot be written.
        """


class CudaMemory:
    """Memory of NVIDIA's GPUs, by CUDA's handles between processes."""

    def __init__(self) -> None:
        """Start without looking at any GPU."""
        self._staging: dict[int, PinnedStaging] = {}

    def open(self, handle: bytes, device_id: int) -> tuple[int, int]:
        """Map the memory that a handle names; see `GpuMemory.open`."""
        runtime = cuda.Runtime.get()
        given = cuda.IpcHandle()
        ctypes.memmove(ctypes.byref(given), handle, HANDLE_BYTES)
        pointer = ctypes.c_void_p()
        with running(True):
            runtime.call("cudaSetDevice", device_id)
            runtime.call("cudaIpcOpenMemHandle", ctypes.byref(pointer), given, _LAZY_PEER_ACCESS)
            address = pointer.value or 0
            return address, _room(address)

    def close(self, address: int, device_id: int) -> None:
        """Give mapped memory back."""
        runtime = cuda.Runtime.get()
        try:
            with running(True):
                runtime.call("cudaSetDevice", device_id)
                runtime.call("cudaIpcCloseMemHandle", address)
        except DeviceFault:
            return

    def read(self, address: int, size: int, device_id: int) -> bytes:
        """Return bytes from an address."""
        data = np.empty(size, np.uint8)
        with running(True):
            self._on(device_id).download(data, address)
        return data.tobytes()

    def write(self, address: int, data: bytes, device_id: int) -> None:
        """Put bytes to an address."""
        with running(True):
            self._on(device_id).upload(address, np.frombuffer(data, np.uint8))

    def _on(self, device_id: int) -> PinnedStaging:
        if device_id not in self._staging:
            self._staging[device_id] = PinnedStaging(device_id)
        return self._staging[device_id]


def _room(address: int) -> int:
    """Return how many bytes of an allocation follow an address."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    driver = ctypes.CDLL(cuda.DRIVER)
    code = driver.cuMemGetAddressRange_v2(
        ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
    )
    if code:
        raise DeviceFault(f"cuMemGetAddressRange: CUDA failure {code}", code=code)
    return base.value + size.value - address
