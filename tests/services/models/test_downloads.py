"""Many downloads at a time: what they take together is bounded, and all of them go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import downloads
from pollard.services.models.blobs import PIECE_BYTES

BALLAST = bytes(range(256)) * 4096


def test_pieces_shrink_with_the_number_of_downloads_and_grow_again() -> None:
    pace = downloads.Pace()
    assert pace.piece_bytes() == PIECE_BYTES
    counted = [pace.download() for _ in range(5000)]
    for number, each in enumerate(counted, 1):
        each.__enter__()
        size = pace.piece_bytes()
        assert size == downloads.LEAST_PIECE_BYTES or size * number <= downloads.IN_FLIGHT_BYTES
    assert pace.piece_bytes() == downloads.LEAST_PIECE_BYTES
    for each in counted:
        each.__exit__(None, None, None)
    assert pace.piece_bytes() == PIECE_BYTES
    pace.close()


async def test_fifty_that_want_one_bundle_at_once_all_get_it(
    suite: Any, bundles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "IN_FLIGHT_BYTES", 50 * 32 * 1024)
    await suite.client.push(bundles.tar(1, **{"ballast.bin": BALLAST}))
    begun = 0
    all_here = asyncio.Event()

    async def download() -> None:
        nonlocal begun
        request = pb.DownloadBundleRequest(name="models/m/revisions/1")
        got = bytearray()
        async for piece in suite.client.models.DownloadBundle(request, timeout=60):
            if piece.path == "manifest.json":
                begun += 1
                if begun == 50:
                    all_here.set()
                await all_here.wait()
            if piece.path == "ballast.bin":
                got += piece.data
        assert got == BALLAST

    await asyncio.gather(*(download() for _ in range(50)))
    # None is left counted, also of those that are given up.
    call = suite.client.models.DownloadBundle(pb.DownloadBundleRequest(name="models/m/revisions/1"))
    await call.read()
    call.cancel()
    async with asyncio.timeout(30):
        while suite.service._models.pace._downloads:
            await asyncio.sleep(0.02)
