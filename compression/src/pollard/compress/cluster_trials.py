"""Trials of a search on the nodes of a Ray cluster.

What a trial needs travels with it once a node: the recipe, the weights, the images, and the tables
of latencies, which were measured where the search was begun. So all trials cut by the same tables,
and the same points come to the same networks as without Ray. What they are measured by runs on
their nodes, whose processors must therefore be like the one here.

A node that is lost costs the trials that ran there, which Ray begins again on another one.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from pollard.compress import search_trials
from pollard.compress.cluster import cores, joined, measures_as, software
from pollard.compress.errors import CompressionError
from pollard.compress.search import Outcome, Point
from pollard.compress.trials import TrialsLost
from pollard.runtime.machine import Machine

_BEGUN_AGAIN = 3
"""How often a trial is begun again that was lost with its node or process."""


@dataclass(frozen=True)
class Kit:
    """What a node needs for its trials."""

    key: str
    """What it is known by: another search has another one."""
    setting: search_trials.Setting
    pixels: search_trials.Pixels
    weights: bytes
    weights_suffix: str
    tables: dict[str, bytes]
    """Name of a file → a table of latencies."""
    measures_as: tuple[str, tuple[str, ...], str]
    software: str


def pack(
    setting: search_trials.Setting, pixels: search_trials.Pixels, tables: Iterable[Path]
) -> Kit:
    """Gather what nodes need.

    Args:
        setting: What trials start from; its recipe names files of this machine.
        pixels: Their images.
        tables: Files of the tables of latencies.
    """
    path = Path(setting.recipe.weights)
    weights = path.read_bytes()
    content = {table.name: table.read_bytes() for table in tables}
    digest = hashlib.sha256(repr((setting.recipe, setting.digest)).encode())
    # A process of a node may be met again: by a parent trained anew into the same file, too.
    for each in (weights, *content.values()):
        digest.update(hashlib.sha256(each).digest())
    return Kit(
        digest.hexdigest(),
        setting,
        pixels,
        weights,
        path.suffix,
        content,
        measures_as(Machine.detect()),
        software(),
    )


class ClusterTrials:
    """Runs trials on a Ray cluster, one for each of its processor cores."""

    def __init__(
        self,
        address: str,
        kit: Kit,
        most: int,
        *,
        run: Callable[[Kit, Point], Outcome | str] | None = None,
    ) -> None:
        """Remember what to run.

        Args:
            address: As for :func:`pollard.compress.cluster.joined`.
            kit: What each node is given.
            most: Largest number of trials at a time.
            run: What a trial does, on its node; :func:`run_trial`.
        """
        self._run = run or run_trial
        self._address, self._kit, self._most = address, kit, most
        self._stack = ExitStack()
        self._ray: ModuleType | None = None
        self._running: set[Any] = set()
        self._lock = threading.Lock()

    @property
    def at_once(self) -> int:
        """One for each core; it changes with the cluster."""
        assert self._ray is not None  # noqa: S101 - it is entered
        return min(self._most, cores(self._ray))

    def submit(self, point: Point) -> Future[Outcome]:
        """Begin a trial where a core is free."""
        ref = self._task.remote(self._given, point)
        with self._lock:
            self._running.add(ref)
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        ref.future().add_done_callback(partial(self._ended, ref, future))
        return future

    def _ended(self, ref: Any, future: Future[Outcome], told: Future[Any]) -> None:
        with self._lock:
            self._running.discard(ref)
        if told.cancelled():
            future.set_exception(TrialsLost("a trial was cancelled"))
        elif (error := told.exception()) is not None:
            future.set_exception(_meant(error))
        elif isinstance(problem := told.result(), str):
            future.set_exception(CompressionError(problem))
        else:
            future.set_result(told.result())

    def __enter__(self) -> ClusterTrials:
        """Join the cluster.

        Raises:
            UsageInvalid: Ray is not installed.
            CompressionError: no cluster answers.
        """
        self._ray = self._stack.enter_context(joined(self._address))
        self._given = self._ray.put(self._kit)
        self._task = self._ray.remote(num_cpus=1, max_retries=_BEGUN_AGAIN)(self._run)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Cancel what still runs, and leave the cluster."""
        assert self._ray is not None  # noqa: S101
        with self._lock:
            running = list(self._running)
        for ref in running:
            self._ray.cancel(ref, force=True)
        self._given = None
        self._stack.close()


def _meant(error: BaseException) -> BaseException:
    """Return what the search is told of an error of Ray's."""
    import ray.exceptions

    if isinstance(error, NodeUnfit):
        return CompressionError(str(error.args[0]))
    task_failed: bool = isinstance(error, ray.exceptions.RayTaskError)
    if task_failed:
        return error
    why = " ".join(str(error).split())[:300]
    return TrialsLost(f"the Ray cluster lost a trial {_BEGUN_AGAIN + 1} times ({why})")


class NodeUnfit(Exception):
    """A node that cannot run trials of this search."""


def run_trial(kit: Kit, point: Point) -> Outcome | str:
    """Run a trial on a node; a point that cannot be reached is told by its words.

    Raises:
        NodeUnfit: trials must not run here.
    """
    if _ready != [kit.key]:
        _make_ready(kit)
        _ready[:] = [kit.key]
    try:
        return search_trials.evaluate(point)
    except CompressionError as error:
        return str(error)


_ready: list[str] = []
_kept: list[tempfile.TemporaryDirectory[str]] = []


def _make_ready(kit: Kit) -> None:
    here = measures_as(Machine.detect())
    node = os.uname().nodename
    if here != kit.measures_as:
        raise NodeUnfit(
            f"node {node} measures on {_told(here)}, and the search was begun on "
            f"{_told(kit.measures_as)}: what is fast on one may not be on the other. Begin it on a "
            "machine like the nodes, or keep the node out of the cluster"
        )
    if software() != kit.software:
        raise NodeUnfit(
            f"node {node} has pollard-compression {software()}, and the search was begun with "
            f"{kit.software}: install the same version on every node"
        )
    folder = tempfile.TemporaryDirectory(prefix="pollard-node-")
    for before in _kept:
        before.cleanup()
    _kept[:] = [folder]
    tables = Path(folder.name) / "latency"
    tables.mkdir()
    for name, content in kit.tables.items():
        (tables / name).write_bytes(content)
    os.environ["POLLARD_CACHE"] = folder.name
    weights = Path(folder.name) / f"weights{kit.weights_suffix}"
    weights.write_bytes(kit.weights)
    setting = replace(kit.setting, recipe=replace(kit.setting.recipe, weights=str(weights)))
    try:
        search_trials.prepare_here(setting, kit.pixels)
    except CompressionError as error:
        raise NodeUnfit(f"node {node}: {error}") from error


def _told(measured: tuple[str, tuple[str, ...], str]) -> str:
    processor, features, engine = measured
    return f"{processor} ({', '.join(features) or 'no AVX'}) with onnxruntime {engine}"
