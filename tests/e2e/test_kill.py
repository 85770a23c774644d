"""Kill -9 of any service at a bad moment: after its restart everything is consistent, and nothing
that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pollard.client import (
    Alias,
    AliasSwitchFailed,
    AsyncModelsClient,
    AsyncVisionClient,
    InferenceClient,
    ModelsClient,
    PollardError,
    Progress,
    Unavailable,
    VisionClient,
)
from pollard.runtime.bundle import Bundle
from pollard.runtime.sessions import open_session

BundleMaker = Callable[..., Bundle]
PIXELS = (np.arange(64, dtype=np.uint8) * 3).reshape(8, 8)


def _best(bundle: Bundle) -> int:
    session = open_session(bundle.model_path("cpu-fp32"))
    return int(session.run({"image": PIXELS[None, :, :, None]})["scores"].argmax())


def _until_answered(up: Any, model: str) -> tuple[int, int]:
    """Ask until the suite answers again; return revision and class."""
    give_up = time.monotonic() + 60
    while True:
        try:
            with VisionClient(up.address("preprocess"), timeout=5) as vision:
                answer = vision.predict(PIXELS, model)
                return answer.revision, answer.labels[0].index
        except PollardError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


def _until_managed(up: Any, model: str) -> Alias:
    """Ask until the manager answers again, which the others do not wait for."""
    give_up = time.monotonic() + 60
    while True:
        try:
            with ModelsClient(up.address("models")) as models:
                return models.alias(model)
        except Unavailable:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


@pytest.mark.long
def test_an_upload_survives_the_death_of_the_manager(
    up: Any, make_bundle: BundleMaker, tmp_path: Any
) -> None:
    filler = np.random.default_rng(0).bytes(48 << 20)
    bundle = make_bundle(seed=1, files={"filler.bin": filler})
    killed: dict[str, int] = {}
    moments = threading.Event()

    def kill_once(progress: Progress) -> None:
        if progress.done_bytes > progress.total_bytes // 3 and not moments.is_set():
            moments.set()
            killed.update(up.kill("models"))

    with ModelsClient(up.address("models")) as models:
        pushed = models.push(bundle.path, "uploaded", alias="production", progress=kill_once)
        assert moments.is_set()
        up.wait_ready(after=killed)
        assert (pushed.revision.revision, pushed.revision.bundle_sha256) == (1, bundle.digest)
        assert [item.revision for item in models.revisions("uploaded")] == [1]
        models.pull("uploaded", tmp_path / "pulled")
    assert Bundle.open(tmp_path / "pulled", verify=True).digest == bundle.digest
    assert _until_answered(up, "uploaded") == (1, _best(bundle))


@pytest.mark.long
@pytest.mark.parametrize("service", ["models", "inference", "preprocess"])
def test_a_swap_survives_the_death_of_a_service(
    up: Any, make_bundle: BundleMaker, service: str
) -> None:
    model = f"swapped-{service}"
    bundles = {1: make_bundle(seed=41), 2: make_bundle(seed=42)}
    with ModelsClient(up.address("models")) as models:
        models.push(bundles[1].path, model, alias="production")
        models.push(bundles[2].path, model)
        models.set_alias(model, "production", 2, wait=False)
        killed = up.kill(service)
        up.wait_ready(after=killed)
        # The intention was acknowledged, so the switch ends: there, or back with a reason.
        try:
            reached = models.wait_alias(model, "production", 2, wait_timeout=60).revision
        except AliasSwitchFailed as error:
            reached = error.serving
        revision, best = _until_answered(up, model)
        assert (revision, best) == (reached, _best(bundles[reached]))
        with InferenceClient(up.address("inference"), timeout=10) as inference:
            found = inference.infer(model, {"image": PIXELS[None, :, :, None]})
            assert (found.version, int(found.outputs["scores"].argmax())) == (revision, best)
        # And the next one goes through.
        other = 3 - reached
        assert models.set_alias(model, "production", other, wait_timeout=60).revision == other
    assert _until_answered(up, model) == (other, _best(bundles[other]))


@pytest.mark.long
async def test_requests_go_on_while_the_manager_is_dead(up: Any, make_bundle: BundleMaker) -> None:
    bundle = make_bundle(seed=51)
    async with (
        AsyncModelsClient(up.address("models")) as models,
        AsyncVisionClient(up.address("preprocess"), timeout=10) as vision,
    ):
        await models.push(bundle.path, "unmanaged", alias="production")
        killed = up.kill("models")
        best = _best(bundle)
        for _ in range(100):
            answer = await vision.predict(PIXELS, "unmanaged")
            assert answer.labels[0].index == best
        await asyncio.to_thread(up.wait_ready, after=killed)


@pytest.mark.long
def test_the_command_watches_through_the_death_of_the_manager(
    up: Any, make_bundle: BundleMaker, tmp_path: Any
) -> None:
    told, notes = tmp_path / "told", tmp_path / "notes"
    command = [sys.executable, "-m", "pollard.client.cli", "models", "watch", "--json"]
    with ModelsClient(up.address("models")) as models:
        first = models.events(limit=1)[0].sequence + 1 if models.events(limit=1) else 1
        with told.open("wb") as output, notes.open("wb") as said:
            watching = subprocess.Popen(
                [*command, "--start", str(first), "--server", up.address("models")],
                stdout=output,
                stderr=said,
            )
        try:
            give_up = time.monotonic() + 60
            while "Watching" not in notes.read_text():
                assert time.monotonic() < give_up, notes.read_text()
                time.sleep(0.05)
            models.push(make_bundle(seed=71).path, "watched", alias="production")
            models.push(make_bundle(seed=72).path, "watched")
            killed = up.kill("models")
            up.wait_ready(after=killed)
            _until_managed(up, "watched")
            models.set_alias("watched", "production", 2)
            wanted = [event.sequence for event in reversed(models.events(limit=1000))]
            wanted = wanted[wanted.index(first) :]
            give_up = time.monotonic() + 60
            while len(told.read_text().splitlines()) < len(wanted):
                assert time.monotonic() < give_up
                assert watching.poll() is None, notes.read_text()
                time.sleep(0.05)
        finally:
            watching.send_signal(signal.SIGINT)
            code = watching.wait(timeout=30)
        assert code == 0
    seen = [json.loads(line)["sequence"] for line in told.read_text().splitlines()]
    assert seen[: len(wanted)] == wanted


@pytest.mark.long
def test_everything_dead_at_once_comes_back(up: Any, make_bundle: BundleMaker) -> None:
    bundle = make_bundle(seed=61)
    with ModelsClient(up.address("models")) as models:
        models.push(bundle.path, "phoenix", alias="production")
        killed = {}
        for service in ("models", "inference", "preprocess"):
            killed.update(up.kill(service))
        up.wait_ready(after=killed)
        assert _until_answered(up, "phoenix") == (1, _best(bundle))
    assert _until_managed(up, "phoenix").state == "ACTIVE"
