"""Data-parallel training with processes on the nodes of a Ray cluster.

The process that begins it is the first of them: it tells, writes and keeps the checkpoint, as
without a cluster. The others are actors of Ray, a core each, which take their shares of every batch
(:mod:`pollard.compress.parallel`). They load model and data themselves, by the names that they are
given; weights and a checkpoint to begin from are sent to them.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pollard.compress import kept_weights
from pollard.compress.checkpoint import checkpoint_beside
from pollard.compress.cluster import cores, joined, software
from pollard.compress.data import load_data
from pollard.compress.errors import CompressionError
from pollard.compress.models import resolve
from pollard.compress.train import TrainOptions, TrainResult, train

_LOADING_SECONDS = 300.0
"""How long nodes may take to load what they need before the training begins."""

_ENDING_SECONDS = 10.0
"""How long they may take to put away what they have, when it has ended."""


@dataclass(frozen=True)
class Job:
    """What every process is told."""

    model: str
    data: str
    options: TrainOptions
    how: dict[str, Any]
    """More arguments of :func:`pollard.compress.train.train`."""
    start: bytes
    """Weights to begin from; none where it begins anew."""
    checkpoint: bytes
    """Of the run that is gone on with; likewise."""
    software: str


def train_on_cluster(
    address: str,
    model: str,
    data: str | Path,
    out: Path,
    *,
    options: TrainOptions,
    resume: bool,
    here: dict[str, Any],
    **how: Any,
) -> TrainResult:
    """Train with a process for each core of a Ray cluster, of which this is the first.

    Args:
        address: As for :func:`pollard.compress.cluster.joined`.
        model, data, out, options, resume: As for :func:`pollard.compress.train.train`. `data` is
            what nodes find, too: a name, or a path that leads to the same files everywhere.
        here: Arguments of it that are for this process: what is told and written.
        how: Other arguments of it, for all processes.

    Raises:
        UsageInvalid: Ray is not installed, or as for `train`.
        CompressionError: no cluster answers, a node cannot take part, or one is lost; and as for
            `train`.
    """
    path = checkpoint_beside(out)
    start = b""
    if options.start is not None:
        start = kept_weights.weights_file(options.start).read_bytes()
    going_on = resume and path.exists()
    job = Job(
        model,
        str(data),
        replace(options, start=Path("start.safetensors") if start else None),
        {**how, "resume": going_on},
        start,
        path.read_bytes() if going_on else b"",
        software(),
    )
    with joined(address) as ray:
        others = _Others(ray, job)
        try:
            with _rank(0, others.size, others.meeting):
                others.begin()
                try:
                    return train(
                        model,
                        data,
                        out,
                        options=options,
                        resume=resume,
                        threads=1,
                        device="cpu",
                        **here,
                        **how,
                    )
                except RuntimeError as error:
                    # What carries gradients between processes has no errors of its own kind.
                    if "gloo" not in str(error).lower():
                        raise
                    raise CompressionError(
                        f"the training lost a process ({others.why() or error}); what it has "
                        "learnt is kept: the same command with --resume goes on"
                    ) from error
        finally:
            others.end()


class _Others:
    """The processes on the nodes."""

    def __init__(self, ray: ModuleType, job: Job) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self.size = cores(ray)
        self.meeting = (ray.util.get_node_ip_address(), _free_port())
        self._members: list[Any] = []
        self._running: list[Any] = []
        self._kept: Any = None
        if self.size == 1:
            return  # this process's
        # This process works on a core, too, which Ray does not know of.
        mine = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._kept = ray.remote(num_cpus=1, scheduling_strategy=mine)(_Place).remote()
        actor = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_Member)
        self._members += [actor.remote(job) for _ in range(1, self.size)]
        try:
            ray.get([self._kept.ready.remote()], timeout=_LOADING_SECONDS)
            loading = [member.look.remote() for member in self._members]
            found = ray.get(loading, timeout=_LOADING_SECONDS)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise CompressionError(f"the nodes of the Ray cluster did not begin ({why})") from error
        digest = _digest_of(job)
        for node, problem, theirs in found:
            if problem:
                raise CompressionError(f"node {node}: {problem}")
            if theirs != digest:
                raise CompressionError(f"node {node} has other data at {job.data} than are here")

    def begin(self) -> None:
        """Let them join; they wait for this process."""
        self._running = [
            member.run.remote(rank, self.size, self.meeting)
            for rank, member in enumerate(self._members, 1)
        ]

    def why(self) -> str:
        """Return what ended a process, where that is known."""
        ended, _ = self._ray.wait(self._running, num_returns=len(self._running), timeout=5)
        for one in ended:
            try:
                self._ray.get(one)
            except Exception as error:
                return " ".join(str(error).split())[:300]
        return ""

    def end(self) -> None:
        """Let them put away what they have, and end them."""
        if self._running:
            count = len(self._running)
            self._ray.wait(self._running, num_returns=count, timeout=_ENDING_SECONDS)
        for actor in filter(None, (*self._members, self._kept)):
            self._ray.kill(actor)


class _Place:
    """Holds the core that the first process works on."""

    def ready(self) -> None:
        """Answer when the core is there."""


class _Member:
    """A process on a node."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def look(self) -> tuple[str, str, str]:
        """Load the data, and return the node's name, what is wrong, and the data's digest."""
        job, node = self._job, os.uname().nodename
        if software() != job.software:
            return node, f"it has pollard-compression {software()}, not {job.software}", ""
        try:
            return node, "", _digest_of(job)
        except CompressionError as error:
            return node, str(error), ""

    def run(self, rank: int, size: int, meeting: tuple[str, int]) -> None:
        """Take part until the training has ended."""
        job, options = self._job, self._job.options
        with tempfile.TemporaryDirectory(prefix="pollard-node-") as folder:
            out = Path(folder) / "weights.safetensors"
            if job.start:
                options = replace(options, start=Path(folder) / "start.safetensors")
                (Path(folder) / "start.safetensors").write_bytes(job.start)
            if job.checkpoint:
                checkpoint_beside(out).write_bytes(job.checkpoint)
            with _rank(rank, size, meeting):
                train(
                    job.model, job.data, out, options=options, threads=1, device="cpu", **job.how
                )  # fmt: skip


def _digest_of(job: Job) -> str:
    """Load the data as the training does, and return what they are known by.

    Raises:
        CompressionError: they cannot be used.
    """
    source = resolve(job.model, job.how.get("spec"))
    return load_data(
        job.data, source.spec, task=source.task,
        max_train_images=job.how.get("max_train_images"), validation=job.how.get("validation"),
    ).digest  # fmt: skip


@contextmanager
def _rank(rank: int, size: int, meeting: tuple[str, int]) -> Iterator[None]:
    """Be one of the processes, in the way that torchrun tells it."""
    told = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": meeting[0],
        "MASTER_PORT": str(meeting[1]),
    }
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
