"""A table of measured latencies: how long onnxruntime takes for one operator here.

Operators are run side by side in small graphs, in the form in which they would stand in
a whole network, and timed by onnxruntime's own profiler. What the profiler adds is
measured on an operator that does nothing and taken off; what starting an operator costs
without a profiler is put in its place. Layout changes at the borders of the small graphs
are not counted: inside a network neighbours share a layout.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pollard.compress.kernels import Kernel, build_graph
from pollard.compress.progress import Reporter
from pollard.runtime.bundle import write_durably
from pollard.runtime.machine import Machine

SCHEMA_VERSION = 2

# Operators of one small graph: enough to spread the cost of making a session, few enough
# that every one is met again before the machine has changed.
_SIDE_BY_SIDE = 24
_ROUNDS = 3
"""Times that each operator is met, with others between: a machine that is shared is slower for
seconds, by half and more, and what it does undisturbed is seen in one of them."""
_KEPT_TOGETHER = 8
"""Small graphs of which the rounds are taken, and the rows then kept, before the next ones."""
_SECONDS = 0.15
"""Of one small graph in a round."""
_LEAST_RUNS, _MOST_RUNS = 8, 60

# Not counted where they are not the operator itself.
_LAYOUT = frozenset({"Transpose", "ReorderInput", "ReorderOutput"})


@dataclass(frozen=True)
class Overheads:
    """What running costs beside the operators, in microseconds."""

    per_run: float
    """For a call."""
    per_node: float
    """For each operator."""


@dataclass
class LatencyTable:
    """Latencies of operators in one target on this machine; grows by measuring.

    Rows are kept in a file by target, batch, threads, processor and version of
    onnxruntime, and are read again by whoever asks next.
    """

    target: str
    """"cpu-fp32" or "cpu-int8"."""
    batch: int = 1
    threads: int = 1
    machine: Machine = field(default_factory=Machine.detect)
    folder: Path | None = None
    """Where tables are kept; the user's cache when None."""
    rows: dict[str, float] = field(default_factory=dict)
    """Key of a kernel → microseconds."""

    def __post_init__(self) -> None:
        folder = self.folder or default_folder()
        identity = json.dumps(self.identity(), sort_keys=True).encode()
        self.path = folder / f"{self.target}-{hashlib.sha256(identity).hexdigest()[:16]}.json"
        self.rows = {**_read(self.path, self.identity()), **self.rows}

    def identity(self) -> dict[str, object]:
        """Return what the rows depend on beside the operator."""
        return {
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "batch": self.batch,
            "threads": self.threads,
            "processor": self.machine.processor,
            "cpu_features": sorted(f for f in self.machine.cpu_features if f.startswith("avx")),
            "onnxruntime": self.machine.onnxruntime,
        }

    def digest(self, kernels: Iterable[Kernel]) -> str:
        """Return a digest of the rows of ``kernels`` and of what they depend on."""
        keys = sorted({kernel.key for kernel in kernels})
        told = [self.identity(), [[key, self.rows[key]] for key in keys]]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def __getitem__(self, kernel: Kernel) -> float:
        """Return the microseconds of a measured kernel."""
        return self.rows[kernel.key]

    @property
    def overheads(self) -> Overheads:
        """What running costs beside the operators."""
        return Overheads(self.rows["per run"], self.rows["per node"])

    def measure(
        self,
        kernels: Iterable[Kernel],
        *,
        reporter: Reporter | None = None,
        again: bool = False,
        between: Callable[[], None] = lambda: None,
    ) -> int:
        """Measure what the table lacks, and keep it on disk.

        Args:
            kernels: What is needed.
            reporter: Told of progress.
            again: Measure what the table has, too.
            between: Called after each round, for what is to be compared with the rows.

        Returns:
            How many kernels were measured.
        """
        reporter = reporter or Reporter()
        wanted = {k.key: k for k in kernels if again or k.key not in self.rows}
        if not wanted and "per run" in self.rows:
            return 0
        if again or "per run" not in self.rows:
            found = _overheads(self.threads)
            self.rows |= {"per run": found.per_run, "per node": found.per_node}
            self._save()
        # Kernels of one kind are far apart, so that a disturbance does not meet one layer
        # in all its widths.
        items = list(wanted.values())
        graphs = -(-len(items) // _SIDE_BY_SIDE)
        chunks = [items[start::graphs] for start in range(graphs)]
        with reporter.step(f"Timing operators ({self.target})", _ROUNDS * len(items)) as step:
            for first in range(0, graphs, _KEPT_TOGETHER):
                best: dict[str, float] = {}
                for _ in range(_ROUNDS):
                    for chunk in chunks[first : first + _KEPT_TOGETHER]:
                        for key, taken in self._time(chunk).items():
                            best[key] = min(taken, best.get(key, taken))
                        step.advance(len(chunk))
                    between()
                self.rows |= best
                self._save()
        return len(items)

    def _time(self, kernels: list[Kernel]) -> dict[str, float]:
        named = {f"k{index}": kernel for index, kernel in enumerate(kernels)}
        model = build_graph(named, self.batch, self.target == "cpu-int8")
        blank = helper.make_node("Neg", ["blank.x"], ["blank.y"], name="blank.1")
        model.graph.node.append(blank)
        for side, name in ((model.graph.input, "blank.x"), (model.graph.output, "blank.y")):
            side.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]))
        events = _profile(model, self.threads)
        nothing = _typical(events.pop("blank")["blank.1 Neg"])
        overheads = self.overheads
        result: dict[str, float] = {}
        for prefix, kernel in named.items():
            total = 0.0
            for name, durations in events.get(prefix, {}).items():
                own = name.rpartition(" ")[2] not in _LAYOUT or kernel.kind.endswith("Pixels")
                if own:
                    total += max(0.0, _typical(durations) - nothing) + overheads.per_node
            result[kernel.key] = round(max(total, overheads.per_node), 3)
        return result

    def _save(self) -> None:
        # What another process has measured meanwhile is kept.
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = {**_read(self.path, self.identity()), **self.rows}
        content = {**self.identity(), "rows": dict(sorted(rows.items()))}
        write_durably(self.path, (json.dumps(content, indent=1) + "\n").encode())


def default_folder() -> Path:
    """Return where tables are kept: `POLLARD_CACHE`, or the user's cache directory."""
    if chosen := os.environ.get("POLLARD_CACHE"):
        return Path(chosen) / "latency"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pollard" / "latency"


def _read(path: Path, identity: Mapping[str, object]) -> dict[str, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = {str(key): float(value) for key, value in content.pop("rows").items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}  # absent or damaged: measured anew
    return rows if content == dict(identity) else {}


def _typical(durations: list[float]) -> float:
    """Return the mean of the fastest fifth: what it takes undisturbed."""
    ordered = np.sort(np.asarray(durations, np.float64))
    return float(ordered[: max(1, len(ordered) // 5)].mean())


def typical_us(call: Any, seconds: float = 1.0) -> float:
    """Return the mean of the fastest fifth of the calls that fit into ``seconds``."""
    times: list[float] = []
    for _ in range(5):
        call()
    end = time.perf_counter() + seconds
    while len(times) < 20 or time.perf_counter() < end:
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1000)
    return _typical(times)


def _session(model: onnx.ModelProto, threads: int, profile: str = "") -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _feeds(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    generator = np.random.default_rng(1)
    feeds: dict[str, NDArray[np.generic]] = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            feeds[value.name] = generator.integers(0, 256, shape, np.uint8)
        else:
            feeds[value.name] = generator.standard_normal(shape, np.float32)
    return feeds


def _profile(model: onnx.ModelProto, threads: int) -> dict[str, dict[str, list[float]]]:
    """Return prefix → "node operator" → durations in microseconds."""
    with tempfile.TemporaryDirectory(prefix="pollard-latency-") as folder:
        session = _session(model, threads, str(Path(folder) / "profile"))
        feeds = _feeds(model)
        session.run(None, feeds)
        started = time.perf_counter()
        session.run(None, feeds)
        once = max(time.perf_counter() - started, 1e-6)
        runs = int(np.clip(_SECONDS / once, _LEAST_RUNS, _MOST_RUNS))
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            # A dense layer with its activation is called "fused k4.1".
            prefix = name.rpartition(" ")[2].partition(".")[0]
            # The clock counts whole microseconds that have passed.
            node = f"{name.removesuffix('_kernel_time')} {event['args']['op_name']}"
            found[prefix][node].append(float(event["dur"]) + 0.5)
    return found


def _overheads(threads: int) -> Overheads:
    """Time two chains of an operator that does next to nothing."""
    runs = {}
    for length in (40, 240):
        names = [f"t{index}" for index in range(length + 1)]
        nodes = [helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
        ends = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1])]
            for name in (names[0], names[-1])
        ]
        model = helper.make_model(
            helper.make_graph(nodes, "chain", ends[0], ends[1]),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
        session, feeds = _session(model, threads), _feeds(model)
        runs[length] = lambda s=session, f=feeds: s.run(None, f)
    # In turns, for their difference counts; and neither costs nothing.
    rounds = [
        {length: typical_us(run, 0.1) for length, run in runs.items()} for _ in range(_ROUNDS)
    ]
    times = {length: min(each[length] for each in rounds) for length in runs}
    per_node = max(0.05, (times[240] - times[40]) / 200)
    return Overheads(round(max(0.5, times[40] - 40 * per_node), 3), round(per_node, 3))
