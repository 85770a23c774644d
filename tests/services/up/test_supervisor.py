"""The supervisor starts in order, starts again, gives up in words, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pollard.services.common.errors import StartupError
from pollard.services.up.plan import ServicePlan
from pollard.services.up.supervisor import Supervisor

Plans = Callable[..., list[ServicePlan]]


class Watched:
    """A supervisor, and what it said."""

    def __init__(self, plans: list[ServicePlan], **options: Any) -> None:
        self.notices: list[str] = []
        self.lines: list[tuple[str, str]] = []
        self.healthy = asyncio.Event()
        self.seen: set[int] = set()
        self.supervisor = Supervisor(
            plans,
            notice=self.notices.append,
            write_line=lambda name, line: self.lines.append((name, line)),
            changed=self._changed,
            **{"start_timeout_seconds": 30.0, "grace_seconds": 5.0, **options},
        )
        self.task: asyncio.Task[int] | None = None

    def _changed(self) -> None:
        self.seen |= set(self.pids.values())
        self.healthy.set()

    @property
    def pids(self) -> dict[str, int]:
        return {
            name: child.pid
            for name, child in self.supervisor.children.items()
            if child.pid is not None
        }

    async def run(self) -> None:
        self.task = asyncio.create_task(self.supervisor.run())
        waiting = asyncio.create_task(self.healthy.wait())
        await asyncio.wait({self.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def stop(self) -> int:
        assert self.task is not None
        self.supervisor.request_stop()
        return await self.task


@pytest.fixture
async def watch() -> AsyncIterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(plans: list[ServicePlan], **options: Any) -> Watched:
        made.append(Watched(plans, **options))
        return made[-1]

    yield make
    for watched in made:
        for child in watched.supervisor.children.values():
            child.kill()
        if watched.task is not None and not watched.task.done():
            watched.task.cancel()
            await asyncio.gather(watched.task, return_exceptions=True)


async def test_services_start_and_stop_in_order(
    watch: Any, fake_plans: Plans, tmp_path: Path
) -> None:
    watched = watch(fake_plans(replicas=2))
    await watched.run()
    assert set(watched.pids) == {"models", "inference", "inference-2", "preprocess"}
    pids = list(watched.pids.values())
    assert await watched.stop() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)
    for inference in ("inference", "inference-2"):
        journals = [tmp_path / f"{name}.journal" for name in ("preprocess", inference, "models")]
        assert all(journal.read_text().endswith("stopped\n") for journal in journals)
        written = [journal.stat().st_mtime_ns for journal in journals]
        assert written == sorted(written)
    assert ("models", "hello from well") in watched.lines


async def test_a_service_that_died_is_started_again(watch: Any, fake_plans: Plans) -> None:
    watched = watch(fake_plans())
    await watched.run()
    before = watched.pids
    watched.healthy.clear()
    os.kill(before["inference"], signal.SIGKILL)
    await asyncio.wait_for(watched.healthy.wait(), 30)
    after = watched.pids
    assert after["inference"] != before["inference"]
    assert after["models"] == before["models"]
    assert any("inference was killed by SIGKILL" in notice for notice in watched.notices)
    assert any("inference is healthy again" in notice for notice in watched.notices)
    assert await watched.stop() == 0


async def test_a_service_that_keeps_dying_ends_everything_in_words(
    watch: Any, fake_plans: Plans, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pollard.services.up.supervisor._FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("pollard.services.up.supervisor._QUICK_DEATHS", 2)
    watched = watch(fake_plans(preprocess="dies"))
    await watched.run()
    (tmp_path / "preprocess.journal.die").touch()
    with pytest.raises(StartupError, match="preprocess died 3 times") as caught:
        await watched.task
    assert "hello from dies" in str(caught.value)
    assert watched.pids == {}


async def test_a_service_that_hangs_is_killed_and_started_again(
    watch: Any, fake_plans: Plans
) -> None:
    watched = watch(fake_plans(), hang_seconds=3.0)
    await watched.run()
    before = watched.pids
    watched.healthy.clear()
    # Alive for the kernel, and its port still takes connections; but nobody answers.
    os.kill(before["inference"], signal.SIGSTOP)
    await asyncio.wait_for(watched.healthy.wait(), 30)
    after = watched.pids
    assert not psutil.pid_exists(before["inference"])
    assert after["inference"] != before["inference"]
    assert {**after, "inference": 0} == {**before, "inference": 0}
    said = "\n".join(watched.notices)
    assert f"inference (process {before['inference']}) has not answered a health check for" in said
    assert "inference hung and was killed; starting it again in 0.2 s" in said
    assert "inference is healthy again" in said
    assert await watched.stop() == 0


async def test_a_service_that_hangs_before_it_is_healthy_again_is_killed_too(
    watch: Any, fake_plans: Plans
) -> None:
    watched = watch(fake_plans(), hang_seconds=3.0)
    await watched.run()
    first = watched.pids["inference"]
    # Its next process gets to nothing before it is stopped.
    watched.supervisor._start_timeout = 3.0
    os.kill(first, signal.SIGKILL)
    while watched.pids.get("inference", first) == first:
        await asyncio.sleep(0.001)
    second = watched.pids["inference"]
    os.kill(second, signal.SIGSTOP)
    watched.healthy.clear()
    await asyncio.wait_for(watched.healthy.wait(), 30)
    assert watched.pids["inference"] not in (first, second)
    assert any(f"inference (process {second}) has not" in notice for notice in watched.notices)
    assert await watched.stop() == 0


async def test_one_that_answers_that_it_does_not_serve_is_left_alone(
    watch: Any, fake_plans: Plans, tmp_path: Path
) -> None:
    watched = watch(fake_plans(preprocess="moody"), hang_seconds=3.0)
    await watched.run()
    before = watched.pids
    (tmp_path / "preprocess.journal.moody").touch()
    await asyncio.sleep(4.0)
    assert watched.pids == before
    assert not any("hangs" in notice for notice in watched.notices)
    assert await watched.stop() == 0


async def test_hangs_are_not_looked_for_when_nobody_wants_that(
    watch: Any, fake_plans: Plans
) -> None:
    watched = watch(fake_plans(), hang_seconds=0)
    await watched.run()
    pid = watched.pids["models"]
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(0.5)
    assert watched.pids["models"] == pid
    os.kill(pid, signal.SIGCONT)
    assert await watched.stop() == 0


async def test_the_pause_grows_while_a_service_keeps_dying(
    watch: Any, fake_plans: Plans, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pollard.services.up.supervisor._FIRST_BACKOFF_SECONDS", 0.01)
    watched = watch(fake_plans(preprocess="dies"))
    await watched.run()
    (tmp_path / "preprocess.journal.die").touch()
    with pytest.raises(StartupError, match="preprocess died 6 times"):
        await watched.task
    pauses = [n.rsplit(" in ")[-1] for n in watched.notices if "starting it again in" in n]
    assert pauses == ["0.01 s", "0.02 s", "0.04 s", "0.08 s", "0.16 s"]


async def test_a_service_that_cannot_start_ends_everything_with_what_it_said(
    watch: Any, fake_plans: Plans
) -> None:
    watched = watch(fake_plans(inference="refuses"))
    await watched.run()
    with pytest.raises(StartupError, match="inference ended with exit code 3") as caught:
        await watched.task
    assert "error: I do not want to" in str(caught.value)
    assert watched.pids == {}


async def test_a_service_that_never_serves_is_not_waited_for_for_ever(
    watch: Any, fake_plans: Plans
) -> None:
    watched = watch(fake_plans(models="ill"), start_timeout_seconds=1.5)
    await watched.run()
    with pytest.raises(StartupError, match=r"models.* not all healthy after 1\.5 s"):
        await watched.task
    assert watched.pids == {}


async def test_a_stop_while_starting_leaves_nothing(watch: Any, fake_plans: Plans) -> None:
    watched = watch(fake_plans(models="ill"))
    watched.task = asyncio.create_task(watched.supervisor.run())
    while not watched.pids:
        await asyncio.sleep(0.01)
    await watched.stop()
    assert watched.pids == {}


async def test_a_service_that_does_not_stop_is_killed(
    watch: Any, fake_plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pollard.services.up.supervisor._KILL_AFTER_GRACE_SECONDS", 0.2)
    watched = watch(fake_plans(inference="deaf"), grace_seconds=0.1)
    await watched.run()
    assert await watched.stop() == 1
    assert "inference did not stop in time and was killed" in watched.notices
    assert watched.pids == {}


async def test_asked_twice_it_does_not_wait(watch: Any, fake_plans: Plans) -> None:
    watched = watch(fake_plans(preprocess="deaf"), grace_seconds=600.0)
    await watched.run()
    watched.supervisor.request_stop()
    watched.supervisor.request_stop()
    assert await watched.task == 1
    assert watched.pids == {}
