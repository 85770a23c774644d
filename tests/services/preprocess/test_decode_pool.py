"""Decode workers may hang or crash; the images around them are served."""

import asyncio
import contextlib
import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import (
    ImageDamaged,
    ImageEmpty,
    ImageInvalid,
    ImageTooLarge,
    ImageUnsupported,
)
from pollard.runtime.transforms import Pipeline, decode, normalize, resize
from pollard.services.preprocess.decode_pool import OUTCOMES, DecodePool
from pollard.services.preprocess.errors import DecoderCrashed, DecodersBusy, DecodeTimeout
from pollard.services.preprocess.worker import WorkerLimits


def serialized(*steps: bundle_pb2.PreprocessStep) -> bytes:
    return bundle_pb2.Manifest(preprocess=steps).SerializeToString()


STEPS = serialized(decode(), resize(16, 12))


@pytest.fixture
async def start_pool():
    pools = []

    async def start(workers=1, max_waiting_bytes=2**30, **limits):
        pool = DecodePool(workers, WorkerLimits(**limits), max_waiting_bytes)
        pools.append(pool)
        await pool.start()
        return pool

    yield start
    for pool in pools:
        await pool.close()
        assert pool.pids == []


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_gives_what_the_pipeline_gives(start_pool, make_picture):
    pool = await start_pool(workers=2)
    variants = [
        [decode(), resize(16, 12)],
        [decode(gray=True), resize(5, 7)],
        [decode(), resize(16, 12), normalize([0.5] * 3, [0.2] * 3, layout="NCHW")],
    ]
    for steps in variants:
        expected = Pipeline(steps).apply(make_picture())
        result = await pool.transform(serialized(*steps), make_picture())
        assert np.array_equal(result.array, expected.array)
        assert result.array.dtype == expected.array.dtype
        assert result.geometry == expected.geometry


async def test_many_images_at_once(start_pool, make_picture):
    pool = await start_pool(workers=2)
    pictures = [make_picture(seed) for seed in range(40)]
    results = await asyncio.gather(*(pool.transform(STEPS, picture) for picture in pictures))
    pipeline = Pipeline([decode(), resize(16, 12)])
    for picture, result in zip(pictures, results, strict=True):
        assert np.array_equal(result.array, pipeline.apply(picture).array)


async def test_image_errors_come_back_as_themselves_and_the_worker_lives_on(
    start_pool, make_picture
):
    pool = await start_pool(max_image_bytes=100_000, max_image_pixels=10_000)
    before = pool.pids
    for content, kind in [
        (b"", ImageEmpty),
        (b"no image", ImageUnsupported),
        (make_picture()[:-60], ImageDamaged),
        (make_picture(width=200, height=51), ImageTooLarge),
        (b"x" * 100_001, ImageTooLarge),
    ]:
        with pytest.raises(kind) as caught:
            await pool.transform(STEPS, content)
        assert caught.value.message
    with pytest.raises(ImageTooLarge) as caught:
        await pool.transform(STEPS, make_picture(width=200, height=51))
    assert caught.value.metadata["width"] == "200"
    assert (await pool.transform(STEPS, make_picture())).array.shape == (12, 16, 3)
    assert pool.pids == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "GIF", "TIFF", "BMP"])
async def test_hostile_files_are_refused_and_the_worker_lives_on(start_pool, make_picture, kind):
    pool = await start_pool()
    before = pool.pids
    picture = make_picture(kind=kind)
    chance = random.Random(3)
    steps = serialized(decode(icc=True), resize(16, 12))
    for _ in range(40):
        damaged = bytearray(
            picture[: chance.choice((len(picture), chance.randrange(len(picture))))]
        )
        for _ in range(min(len(damaged), 5)):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        # Bits that make another good picture are no error.
        with contextlib.suppress(ImageInvalid):
            await pool.transform(steps, bytes(damaged))
    assert (await pool.transform(steps, picture)).array.shape == (12, 16, 3)
    assert pool.pids == before


async def test_a_worker_that_hangs_is_killed_and_replaced(start_pool, make_picture):
    pool = await start_pool(timeout_seconds=0.5)
    (hanging,) = pool.pids
    os.kill(hanging, signal.SIGSTOP)
    with pytest.raises(DecodeTimeout, match="longer than"):
        await pool.transform(STEPS, make_picture())
    assert (await pool.transform(STEPS, make_picture())).array.shape == (12, 16, 3)
    assert hanging not in pool.pids
    assert not psutil.pid_exists(hanging)


async def test_an_image_whose_worker_is_killed_is_tried_again_and_served(start_pool, make_picture):
    pool = await start_pool()
    (victim,) = pool.pids
    # Stopped, it takes the image and cannot answer before it is killed.
    os.kill(victim, signal.SIGSTOP)
    request = asyncio.create_task(pool.transform(STEPS, make_picture()))
    await until(lambda: pool.in_work)
    os.kill(victim, signal.SIGKILL)
    result = await request
    expected = Pipeline([decode(), resize(16, 12)]).apply(make_picture())
    assert np.array_equal(result.array, expected.array)
    assert victim not in pool.pids


async def test_an_image_that_ends_two_workers_is_refused(start_pool, slow_picture, make_picture):
    pool = await start_pool()
    (first,) = pool.pids
    request = asyncio.create_task(pool.transform(STEPS, slow_picture))
    await until(lambda: pool.in_work)
    os.kill(first, signal.SIGKILL)
    await until(lambda: pool.in_work and pool.pids and pool.pids != [first])
    (second,) = pool.pids
    os.kill(second, signal.SIGKILL)
    with pytest.raises(DecoderCrashed):
        await request
    assert (await pool.transform(STEPS, make_picture())).array.shape == (12, 16, 3)


async def test_an_image_behind_one_that_hangs_is_answered_by_the_replacement(
    start_pool, make_picture
):
    pool = await start_pool(timeout_seconds=0.5)
    (hanging,) = pool.pids
    os.kill(hanging, signal.SIGSTOP)
    first, second = (asyncio.create_task(pool.transform(STEPS, make_picture(i))) for i in (1, 2))
    await until(lambda: next(iter(pool._alive)).jobs == 2)
    assert (pool.in_work, pool.waiting, pool.waiting_bytes) == (1, 1, len(make_picture(2)))
    with pytest.raises(DecodeTimeout):
        await first
    expected = Pipeline([decode(), resize(16, 12)]).apply(make_picture(2))
    assert np.array_equal((await second).array, expected.array)
    assert hanging not in pool.pids
    assert (pool.in_work, pool.waiting, pool.waiting_bytes) == (0, 0, 0)


async def test_an_image_behind_a_slow_one_goes_to_a_worker_that_is_free(start_pool, make_picture):
    pool = await start_pool(workers=2)
    for pid in pool.pids:
        os.kill(pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(pool.transform(STEPS, make_picture(seed))) for seed in range(3)]
    await until(lambda: sorted(worker.jobs for worker in pool._alive) == [1, 2])
    slow, free = sorted(pool._alive, key=lambda worker: -worker.jobs)
    os.kill(free.pid, signal.SIGCONT)
    # The two that the slow worker has not begun, and still it has not been waited for.
    await until(lambda: sum(task.done() for task in tasks) == 2)
    assert not tasks[0].done()
    os.kill(slow.pid, signal.SIGCONT)
    pipeline = Pipeline([decode(), resize(16, 12)])
    for seed, result in enumerate(await asyncio.gather(*tasks)):
        assert np.array_equal(result.array, pipeline.apply(make_picture(seed)).array)
    # What both have done was answered once, and neither is out of step.
    await until(pool_is_idle(pool))
    results = await asyncio.gather(*(pool.transform(STEPS, make_picture(9)) for _ in range(6)))
    assert all(np.array_equal(each.array, results[0].array) for each in results)
    assert pool.outcomes["decoded"] == 9


def pool_is_idle(pool):
    return lambda: pool.in_work == 0 and pool.waiting == 0


async def test_an_image_behind_one_that_crashes_is_not_blamed(start_pool, make_picture):
    pool = await start_pool()
    (first,) = pool.pids
    os.kill(first, signal.SIGSTOP)
    bad = asyncio.create_task(pool.transform(STEPS, make_picture(1)))
    good = asyncio.create_task(pool.transform(serialized(decode()), make_picture(2)))
    await until(lambda: next(iter(pool._alive)).jobs == 2)
    os.kill(first, signal.SIGKILL)
    expected = Pipeline([decode()]).apply(make_picture(2))
    assert np.array_equal((await good).array, expected.array)
    assert (await bad).array.shape == (12, 16, 3)
    assert pool.outcomes["crashed"] == 0


async def test_images_that_wait_when_the_pool_closes_fail(start_pool, make_picture):
    pool = await start_pool()
    os.kill(pool.pids[0], signal.SIGSTOP)
    tasks = [asyncio.create_task(pool.transform(STEPS, make_picture(seed))) for seed in range(4)]
    await until(lambda: pool.waiting == 3)
    await pool.close()
    for task in tasks:
        with pytest.raises(DecoderCrashed, match="stopped"):
            await task
    with pytest.raises(DecoderCrashed, match="stopped"):
        await pool.transform(STEPS, make_picture())


async def test_what_libraries_print_of_an_image_is_counted_and_not_shown(
    start_pool, make_picture, capfd
):
    pool = await start_pool()
    file = io.BytesIO()
    Image.open(io.BytesIO(make_picture())).save(file, "TIFF", compression="tiff_lzw")
    damaged = bytearray(file.getvalue())
    damaged[40:80] = b"\xff" * 40
    with contextlib.suppress(ImageInvalid):
        await pool.transform(STEPS, bytes(damaged))
    assert pool.messages > 0
    assert (await pool.transform(STEPS, make_picture())).array.shape == (12, 16, 3)
    # libtiff's name for a file that has none.
    assert "tempfile" not in capfd.readouterr().err


async def test_idle_workers_that_are_killed_are_replaced(start_pool, make_picture):
    pool = await start_pool(workers=2)
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: len(set(pool.pids) - set(before)) == 2)
    assert (await pool.transform(STEPS, make_picture())).array.shape == (12, 16, 3)
    assert not set(before) & set(pool.pids)


async def test_a_caller_that_goes_away_leaves_the_pool_whole(start_pool, make_picture):
    pool = await start_pool()
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    working = asyncio.create_task(pool.transform(STEPS, make_picture(1)))
    waiting = asyncio.create_task(pool.transform(STEPS, make_picture(2)))
    await asyncio.sleep(0.05)
    for task in (working, waiting):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    os.kill(pid, signal.SIGCONT)
    result = await pool.transform(STEPS, make_picture(3))
    expected = Pipeline([decode(), resize(16, 12)]).apply(make_picture(3))
    assert np.array_equal(result.array, expected.array)
    assert pool.pids == [pid]
    assert pool.outcomes == dict.fromkeys(OUTCOMES, 0) | {"canceled": 2, "decoded": 1}


async def test_more_than_may_wait_is_refused_at_once(start_pool, make_picture):
    picture = make_picture()
    pool = await start_pool(max_waiting_bytes=len(picture))
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(pool.transform(STEPS, picture)) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises(DecodersBusy):
        await pool.transform(STEPS, picture)
    os.kill(pid, signal.SIGCONT)
    await asyncio.gather(*tasks)


BELOW_A_LIMIT = """
import asyncio, resource, sys
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.worker import WorkerLimits

async def main():
    limits = WorkerLimits()
    below = limits.memory_bytes * 3 // 4
    resource.setrlimit(resource.RLIMIT_AS, (below, below))
    pool = DecodePool(1, limits, 2**20)
    await pool.start()
    print(len(pool.pids))
    await pool.close()

asyncio.run(main())
"""


def test_a_service_that_may_have_less_memory_than_its_workers_starts() -> None:
    # As `ulimit -v` or systemd's LimitAS give it.
    done = subprocess.run(
        [sys.executable, "-c", BELOW_A_LIMIT],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split() == ["1"], done.stderr


async def test_an_image_that_needs_more_memory_than_allowed_is_too_large(start_pool, make_picture):
    pool = await start_pool(memory_bytes=256 * 1024**2, max_image_pixels=100_000_000)
    with pytest.raises(ImageTooLarge, match="memory"):
        await pool.transform(STEPS, make_picture(width=9000, height=9000))
    assert (await pool.transform(STEPS, make_picture())).array.shape == (12, 16, 3)


def peak_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


async def test_large_jpegs_are_decoded_within_300_mb_or_refused(start_pool, make_picture):
    pool = await start_pool()
    (pid,) = pool.pids
    await pool.transform(STEPS, make_picture())
    idle = peak_bytes(pid)
    # The largest allowed, 6,000², takes just these 300 MB; a little less tells as much and
    # leaves room for what an allocator rounds up.
    for side in (10_000, 5_800):
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        Image.new("L", (side, side), 90).convert("RGB").save(file, "JPEG", exif=exif)
        if side * side > pool.limits.max_image_pixels:
            with pytest.raises(ImageTooLarge, match="10000 × 10000"):
                await pool.transform(STEPS, file.getvalue())
        else:
            assert (await pool.transform(STEPS, file.getvalue())).array.shape == (12, 16, 3)
    assert peak_bytes(pid) - idle < 300e6
    assert pool.pids == [pid]


def test_workers_end_with_their_parent():
    program = (
        "import asyncio\n"
        "from pollard.services.preprocess.decode_pool import DecodePool\n"
        "async def main():\n"
        "    pool = DecodePool(2)\n"
        "    await pool.start()\n"
        "    print(*pool.pids, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_worker_imports_no_grpc_and_no_onnxruntime():
    program = (
        "import sys, pollard.services.preprocess.worker\n"
        "heavy = {'grpc', 'onnxruntime', 'torch', 'pydantic', 'sqlalchemy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
