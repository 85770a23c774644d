"""What clients are told of regions of GPU memory. That they hold bytes is shown in tests/gpu."""

from __future__ import annotations

import base64

import pytest

from pollard.runtime.cuda_memory import HANDLE_BYTES
from pollard.runtime.errors import DeviceFault
from pollard.services.inference.errors import (
    FeatureNotOffered,
    RegionExists,
    RegionFailed,
    RegionUnknown,
    RequestInvalid,
)
from pollard.services.inference.shared_memory import CudaRegion, Region, SharedMemory

HANDLE = bytes(range(HANDLE_BYTES))


class Memory:
    """32 bytes that can go away."""

    def __init__(self) -> None:
        self.data = bytearray(32)
        self.opened = 0
        self.gone = False

    def open(self, handle: bytes, device_id: int) -> tuple[int, int]:
        if handle != HANDLE:
            raise DeviceFault("cudaIpcOpenMemHandle: CUDA failure 1: invalid argument", code=1)
        self.opened += 1
        return 1000, len(self.data)

    def close(self, address: int, device_id: int) -> None:
        self.opened -= 1

    def read(self, address: int, size: int, device_id: int) -> bytes:
        if self.gone:
            raise DeviceFault("cudaMemcpy: CUDA failure 1: invalid argument", code=1)
        return bytes(self.data[address - 1000 : address - 1000 + size])

    def write(self, address: int, data: bytes, device_id: int) -> None:
        self.read(address, len(data), device_id)
        self.data[address - 1000 : address - 1000 + len(data)] = data


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def shared(memory) -> SharedMemory:
    return SharedMemory(enabled=True, gpu=memory)


def test_a_region_is_read_written_and_given_back(shared, memory) -> None:
    shared.register_cuda("r", HANDLE, 0, 16)
    (status,) = shared.cuda_status("r")
    assert (status.name, status.device_id, status.byte_size) == ("r", 0, 16)
    assert shared.status("") == []
    with shared.use("r") as region:
        region.write(4, b"abcd")
        shared.unregister("r", CudaRegion)
        assert region.read(4, 4) == b"abcd"
        assert memory.opened == 1
        with pytest.raises(RequestInvalid, match="not within its 16 bytes"):
            region.read(8, 9)
    assert memory.opened == 0
    with pytest.raises(RegionUnknown), shared.use("r"):
        pass


def test_a_handle_in_base64_is_taken_as_well(shared, memory) -> None:
    shared.register_cuda("r", base64.b64encode(HANDLE), 0, 32)
    assert memory.opened == 1


def test_each_kind_forgets_its_own(shared, memory) -> None:
    shared.register_cuda("r", HANDLE, 0, 16)
    shared.unregister("r", Region)
    shared.unregister("", Region)
    assert memory.opened == 1
    with pytest.raises(RegionUnknown):
        shared.status("r")
    shared.close()
    assert memory.opened == 0


def test_what_cannot_be_registered_is_told(shared, memory) -> None:
    for handle, device, size, kind, words in (
        (b"short", 0, 16, RequestInvalid, "5 bytes"),
        (b"x" * HANDLE_BYTES, 0, 16, RegionFailed, "failed to open CUDA IPC handle"),
        (HANDLE, 0, 33, RequestInvalid, "33 bytes are not within the 32"),
        (HANDLE, 0, 0, RequestInvalid, "invalid args"),
        (HANDLE, -1, 16, RequestInvalid, "invalid args"),
        (HANDLE, 2**32, 16, RequestInvalid, "on GPU 4294967296"),
    ):
        with pytest.raises(kind, match=words):
            shared.register_cuda("r", handle, device, size)
    assert memory.opened == 0
    shared.register_cuda("r", HANDLE, 0, 16)
    with pytest.raises(RegionExists):
        shared.register_cuda("r", HANDLE, 0, 16)
    assert memory.opened == 1
    with pytest.raises(FeatureNotOffered, match="GPUs not supported"):
        SharedMemory(enabled=True).register_cuda("r", HANDLE, 0, 16)


def test_memory_that_goes_away_fails_the_request_alone(shared, memory) -> None:
    shared.register_cuda("r", HANDLE, 0, 16)
    memory.gone = True
    with shared.use("r") as region:
        with pytest.raises(RegionFailed, match="may have ended"):
            region.read(0, 4)
        with pytest.raises(RegionFailed, match="cannot write"):
            region.write(0, b"abc")
