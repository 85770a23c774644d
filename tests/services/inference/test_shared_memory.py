"""Regions that are forgotten while they are used."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pollard.services.inference.errors import RegionFailed, RegionUnknown
from pollard.services.inference.shared_memory import SharedMemory


@pytest.fixture
def path() -> Iterator[Path]:
    """A shared memory object of 32 bytes."""
    path = Path("/dev/shm") / f"pollard-test-{uuid.uuid4().hex}"  # noqa: S108 - they are there
    path.write_bytes(bytes(range(32)))
    yield path
    path.unlink(missing_ok=True)


def test_a_region_in_use_stays_open_and_is_closed_afterwards(path: Path) -> None:
    shared = SharedMemory(enabled=True)
    shared.register("r", f"/{path.name}", 8, 16)
    with shared.use("r") as region, shared.use("r"):
        shared.unregister("r")
        with pytest.raises(RegionUnknown), shared.use("r"):
            pass
        # The name is free again, for another part.
        shared.register("r", path.name, 0, 4)
        assert region.read(0, 4) == bytes([8, 9, 10, 11])
        region.write(4, b"new")
        descriptor = region.descriptor
        os.fstat(descriptor)
    assert region.descriptor == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert path.read_bytes()[12:15] == b"new"
    shared.close()
    assert shared.status("") == []


def test_an_object_that_shrinks_is_an_error_and_is_not_made_larger(path: Path) -> None:
    shared = SharedMemory(enabled=True)
    shared.register("r", path.name, 0, 32)
    os.truncate(path, 10)
    with shared.use("r") as region:
        assert region.read(0, 10) == bytes(range(10))
        with pytest.raises(RegionFailed, match="has become smaller"):
            region.read(0, 11)
        with pytest.raises(RegionFailed, match="has become smaller"):
            region.write(8, b"abc")
    assert path.stat().st_size == 10
    shared.close()


def test_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(RegionFailed):
        SharedMemory(enabled=True).register("r", path.name, 0, 6)
