"""Batches that are padded: what waits takes the place of the padding."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator

import numpy as np
import onnxruntime
import pytest

from pollard.runtime.device_errors import DeviceState
from pollard.runtime.device_session import DeviceSession, Instance
from pollard.runtime.sessions import TensorInfo
from pollard.runtime.staging import PageableStaging
from pollard.services.inference.revision import LoadedRevision, RevisionInfo

TENSOR = TensorInfo("x", "FP32", (-1, 4))


class Held(DeviceSession):
    """A session on the processor in a device's place; each thread's runs wait until it may run."""

    def __init__(self, model: bytes) -> None:
        instances = [
            Instance(
                onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]),
                DeviceState(0),
                PageableStaging(),
                device="cpu",
            )
            for _ in range(2)
        ]
        super().__init__(instances, "cuda-fp16")
        assert self.batch_up_to(16) == (1, 2, 4, 8, 16)
        self.may_run: dict[int, threading.Event] = {}
        self.rows: list[list[int]] = []
        """Of each thread's runs, in the order in which threads came."""

    def run_parts(self, parts, outputs=None):
        me = threading.get_ident()
        if me not in self.may_run:
            self.may_run[me] = threading.Event()
            self.rows.append([])
        self.rows[list(self.may_run).index(me)].append(sum(len(part["x"]) for part in parts))
        assert self.may_run[me].wait(60)
        return super().run_parts(parts, outputs)


@pytest.fixture
async def held(make_bundle) -> AsyncIterator[tuple[LoadedRevision, Held]]:
    """A revision with two workers, both of which have a request that may not run yet."""
    session = Held(make_bundle(1.0).model_path("cpu-fp32").read_bytes())
    info = RevisionInfo(
        model="m",
        revision=1,
        digest="",
        size_bytes=1,
        variant="cuda-fp16",
        target="cuda-fp16",
        inputs=(TENSOR,),
        outputs=(dataclasses.replace(TENSOR, name="y"),),
        max_batch_size=16,
    )
    revision = LoadedRevision(info, session, workers=2, joined_batch=16, max_queue=64)
    first = []
    for busy in (1, 2):
        first.append(asyncio.create_task(ask(revision, 0)))
        while len(session.rows) < busy:
            await asyncio.sleep(0.005)
    yield revision, session
    for each in session.may_run.values():
        each.set()
    await asyncio.gather(*first)
    await revision.retire()


async def ask(revision: LoadedRevision, value: float, rows: int = 1) -> np.ndarray:
    feeds = {"x": np.full((rows, 4), value, np.float32)}
    return (await revision.infer(feeds, revision.info.outputs, time.monotonic() + 60))["y"]


@pytest.mark.parametrize(
    ("waiting", "runs"),
    [
        ([1] * 2, [2]),  # a share of one and the other
        ([1] * 9, [8, 1]),  # not 5, padded to 8
        ([1] * 20, [16, 4]),  # not 11, padded to 16
        ([3] * 4, [12]),  # not 9, padded to 16
        ([3] * 3, [6, 3]),  # a third one would not fit into 8
    ],
)
async def test_what_waits_takes_the_place_of_the_padding(held, waiting, runs) -> None:
    revision, session = held
    asked = [asyncio.create_task(ask(revision, value, rows)) for value, rows in enumerate(waiting)]
    while revision.waiting < len(waiting):
        await asyncio.sleep(0.005)
    next(iter(session.may_run.values())).set()
    for value, answer in enumerate(await asyncio.gather(*asked)):
        assert answer.shape == (waiting[value], 4)
        assert (answer == value + 1).all()
    assert session.rows == [[1, *runs], [1]]


def test_sizes_of_batches_are_those_that_are_computed(make_bundle) -> None:
    session = Held(make_bundle(1.0).model_path("cpu-fp32").read_bytes())
    assert [session.padded(rows) for rows in (1, 3, 4, 9, 16)] == [1, 4, 4, 16, 16]
    assert session.padded(17) == 17  # run plainly
    session.close()
