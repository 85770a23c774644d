"""Look for the 8-bit file that keeps the gate: ranges, balance, biases, training, float.

What costs nothing at run time is tried first and kept where it brings the answers nearer
to the float network's. If the gate is still missed, layers go back to float, those first
that win most for the latency they cost; where that is dear, the network is trained in 8
bits before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from pollard.compress.biases import correct_biases, images_for
from pollard.compress.calibration import METHODS, Method, Range, collect
from pollard.compress.data import Part
from pollard.compress.equalize import equalize, find_pairs
from pollard.compress.errors import QuantizeFailed
from pollard.compress.evaluate import predict_part, session_predictor
from pollard.compress.export import serialize
from pollard.compress.progress import Reporter
from pollard.compress.quantize import Prepared, unsupported_nodes
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import Verdict, task_of
from pollard.runtime.sessions import open_session

# Images that ways are compared on; the gate is judged on all of the choosing part.
_COMPARED = 1024
_SENSITIVITY_IMAGES = 256

# Share of the 8-bit latency that layers in float may cost before training is tried.
_CHEAP = 0.05

Costs = Callable[[], Mapping[str, tuple[float, float]]]
"""Gives layer → its latency in float and in 8 bits, in microseconds; asked only when
layers must go back to float."""


class Judge(Protocol):
    """Says how good a quantized model is; less is better."""

    unit: str
    """What a divergence is in, for people."""

    attainable: bool
    """Whether the float model itself holds the gate."""
    max_drop: float
    """Most that may be lost."""

    def divergence(self, model: bytes, few: bool = False) -> float:
        """Return how far the answers are from the float model's."""

    def drop(self, model: bytes) -> float:
        """Return what is lost against the parent, in the unit of `max_drop`."""


class Train(Protocol):
    """Trains in 8 bits."""

    def __call__(
        self, prepared: Prepared, core: onnx.ModelProto, quantized: onnx.ModelProto
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        """Return the float graph with trained weights, and what to tell of it."""


class ImageJudge:
    """Judges on the choosing part: how far the answers move, and what is lost.

    Args:
        float_file: The float model as it is served, with the same input.
        part: The choosing part.
        parent: How right the parent's answers to it are.
        classes: How many there are.
        max_drop: Most points that may be lost.
    """

    unit = "nats"

    def __init__(
        self, float_file: bytes, part: Part, parent: Verdict, classes: int, max_drop: float
    ) -> None:
        self.max_drop = max_drop
        self._part, self._parent, self._classes = part, parent, classes
        self._task = task_of(part.task)
        answers = _answers(float_file, part)
        self._wanted = answers[:_COMPARED]
        self.attainable = self._drop(answers) <= max_drop + 1e-9

    def divergence(self, model: bytes, few: bool = False) -> float:
        """Return how far the answers are from the float model's, in nats."""
        count = _SENSITIVITY_IMAGES if few else _COMPARED
        given = _answers(model, self._part.take(slice(count)))
        return self._task.divergence(self._wanted[: len(given)], given)

    def drop(self, model: bytes) -> float:
        """Return the points lost against the parent."""
        return self._drop(_answers(model, self._part))

    def _drop(self, answers: NDArray[np.float32]) -> float:
        found = self._task.judge(answers, self._part, self._classes)
        return found.drop_from(self._parent).points


def _answers(model: bytes, part: Part) -> NDArray[np.float32]:
    return predict_part(session_predictor(open_session(model)), part, 32)


@dataclass
class _Trial:
    core: onnx.ModelProto
    ranges: Mapping[str, Range]
    raw: bytes
    divergence: float
    drop: float = np.inf
    float_nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Node → what to tell of why it stayed float."""
    cost_us: float = 0.0
    steps: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[float, float]:
        return (self.cost_us, self.divergence)


@dataclass(frozen=True)
class Found:
    """The best 8-bit file, and how it came about."""

    raw: bytes
    told: dict[str, Any]
    """For the report: method, what was balanced and corrected, all trials, which layers
    stayed float and why."""


def layer_costs_of(module: nn.Module, spec: InputSpec) -> Costs:
    """Return a function that looks a module's layers up in this machine's latency tables."""

    def costs() -> dict[str, tuple[float, float]]:
        # Only here: a profile builds files itself.
        from pollard.compress.latency import LatencyTable
        from pollard.compress.profile import trace

        sums: list[dict[str, float]] = []
        for target in ("cpu-fp32", "cpu-int8"):
            operations, kernels = trace(module, spec, target)
            table = LatencyTable(target)
            table.measure(kernel for kernel in kernels if kernel is not None)
            total: dict[str, float] = {}
            for operation, kernel in zip(operations, kernels[:-1], strict=True):
                if operation.is_layer and kernel is not None:
                    total[operation.name] = total.get(operation.name, 0.0) + table[kernel]
            sums.append(total)
        slow, quick = sums
        return {name: (slow[name], quick[name]) for name in slow.keys() & quick.keys()}

    return costs


def search(
    prepared: Prepared,
    judge: Judge,
    *,
    train: Train | None = None,
    costs: Costs | None = None,
    reporter: Reporter | None = None,
) -> Found:
    """Return the 8-bit file that holds the gate at the least latency, or the nearest to it.

    Args:
        prepared: Of :func:`pollard.compress.quantize.prepare`; its config says what may be
            tried.
        judge: Compares and judges.
        train: Trains in 8 bits; not tried when None.
        costs: Latencies of the layers; by their work when None.
        reporter: Told of progress.

    Raises:
        QuantizeFailed: onnxruntime's quantizer refuses the model.
    """
    return _Search(prepared, judge, train, costs, reporter or Reporter()).run()


class _Search:
    def __init__(
        self,
        prepared: Prepared,
        judge: Judge,
        train: Train | None,
        costs: Costs | None,
        reporter: Reporter,
    ) -> None:
        self._prepared, self._judge = prepared, judge
        self._train, self._costs = train, costs
        self._reporter = reporter
        self._trials: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._advance: Callable[[], None] = lambda: None

    def run(self) -> Found:
        with self._reporter.step("Comparing 8-bit files", 9) as step:
            self._advance = step.advance
            best = self._free()
        self._advance = lambda: None
        best.drop = self._judge.drop(best.raw)
        if best.drop > self._judge.max_drop + 1e-9 and self._judge.attainable:
            best = self._repair(best)
        return Found(best.raw, self._tell(best))

    def _try(
        self,
        name: str,
        core: onnx.ModelProto,
        ranges: Mapping[str, Range],
        steps: dict[str, Any],
    ) -> _Trial:
        raw = serialize(self._prepared.build(ranges, core=core))
        divergence = self._judge.divergence(raw)
        self._trials.append({"name": name, "divergence": divergence})
        self._advance()
        return _Trial(core, ranges, raw, divergence, steps=dict(steps))

    def _free(self) -> _Trial:
        """Return the best of what costs nothing at run time."""
        prepared = self._prepared
        config = prepared.config
        methods: tuple[Method, ...] = METHODS if config.method == "auto" else (config.method,)
        pairs = find_pairs(prepared.core) if config.equalize else []
        statistics = prepared.collect({pair.tensor for pair in pairs})
        tried = [
            self._try(method, prepared.core, statistics.ranges(method), {"method": method})
            for method in methods
        ]
        best = min(tried, key=lambda trial: trial.divergence)
        if pairs:
            core = equalize(prepared.core, pairs, statistics.channel_peaks)
            statistics = collect(core, prepared.read())
            near = {best.steps["method"], methods[0]}
            for method in [each for each in methods if each in near]:
                steps = {"method": method, "equalized_pairs": len(pairs)}
                trial = self._try(
                    f"{method}, channels equalized", core, statistics.ranges(method), steps
                )
                best = min(best, trial, key=lambda trial: trial.divergence)
        if config.correct_biases:
            try:
                inputs = self._inputs(images_for(prepared.core))
                quantized = prepared.build_core(best.ranges, core=best.core)
                core = correct_biases(best.core, quantized, inputs)
                steps = {**best.steps, "biases_corrected": True}
                name = f"{self._last_name(best)}, biases corrected"
                trial = self._try(name, core, best.ranges, steps)
                best = min(best, trial, key=lambda trial: trial.divergence)
            except QuantizeFailed as error:
                self._notes.append(f"biases were not corrected: {error}")
        return best

    def _last_name(self, trial: _Trial) -> str:
        equalized = ", channels equalized" if "equalized_pairs" in trial.steps else ""
        return f"{trial.steps['method']}{equalized}"

    def _inputs(self, count: int) -> NDArray[np.float32]:
        reader = self._prepared.read()
        batches: list[NDArray[np.float32]] = []
        while sum(map(len, batches)) < count and (feeds := reader.get_next()) is not None:
            batches.append(next(iter(feeds.values())))
        return np.concatenate(batches)[:count]

    def _repair(self, plain: _Trial) -> _Trial:
        """Return what holds the gate at the least latency."""
        rivals = [plain]
        allowed = self._prepared.config.float_layers
        if allowed:
            mixed = self._mix(plain)
            rivals.append(mixed)
            if self._holds(mixed) and (self._train is None or self._is_cheap(mixed)):
                return mixed
        if self._train is not None:
            trained = self._trained(plain)
            if trained is not None:
                rivals.append(trained)
                if allowed and not self._holds(trained):
                    rivals.append(self._mix(trained))
        holding = [trial for trial in rivals if self._holds(trial)]
        if holding:
            return min(holding, key=lambda trial: trial.rank)
        self._notes.append(
            f"nothing in 8 bits holds {self._judge.max_drop:g} points on the choosing part"
        )
        return min(rivals, key=lambda trial: trial.drop)

    def _holds(self, trial: _Trial) -> bool:
        return trial.drop <= self._judge.max_drop + 1e-9

    def _is_cheap(self, trial: _Trial) -> bool:
        return trial.cost_us <= _CHEAP * sum(quick for _, quick in self._latencies().values())

    def _trained(self, start: _Trial) -> _Trial | None:
        assert self._train is not None  # noqa: S101 - the caller looked
        prepared = self._prepared
        try:
            quantized = prepared.build_core(start.ranges, core=start.core)
            core, told = self._train(prepared, start.core, quantized)
        except QuantizeFailed as error:
            self._notes.append(f"not trained in 8 bits: {error}")
            return None
        name = f"{self._last_name(start)}, trained in 8 bits"
        trial = self._try(name, core, start.ranges, {**start.steps, "trained": told})
        trial.drop = self._judge.drop(trial.raw)
        self._trials[-1]["drop"] = trial.drop
        return trial

    # Layers back to float.

    def _layers(self) -> dict[str, str]:
        """Return node → layer, of those that 8 bits were meant for."""
        core = self._prepared.core
        constants = {tensor.name for tensor in core.graph.initializer}
        never = set(unsupported_nodes(core))
        return {
            node.name: node.input[1].removesuffix(".weight")
            for node in core.graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul")
            and len(node.input) > 1
            and node.input[1] in constants
            and node.name not in never
        }

    def _latencies(self) -> dict[str, tuple[float, float]]:
        """Return node → microseconds in float and in 8 bits, or guesses by their work."""
        layers = self._layers()
        known = self._costs() if self._costs is not None else {}
        work = _work(self._prepared.core)
        # A guess: float does 10 and 8 bits do 25 multiplications in a nanosecond.
        return {
            node: known.get(layer, (work[node] / 10_000, work[node] / 25_000))
            for node, layer in layers.items()
        }

    def _mix(self, start: _Trial) -> _Trial:
        layers, latencies = self._layers(), self._latencies()
        everything = {node.name for node in self._prepared.core.graph.node}
        told: dict[str, dict[str, Any]] = {}
        with self._reporter.step("Measuring layers in 8 bits", len(layers)) as step:
            for node, layer in layers.items():
                model = self._prepared.build(
                    start.ranges, float_nodes=everything - {node}, core=start.core
                )
                raw = serialize(model)
                slow, quick = latencies[node]
                told[node] = {
                    "layer": layer,
                    "divergence": max(0.0, self._judge.divergence(raw, few=True)),
                    "cost_us": max(0.0, slow - quick),
                }
                step.advance()
        order = sorted(
            layers, key=lambda n: told[n]["divergence"] / (told[n]["cost_us"] + 1e-3), reverse=True
        )
        found = self._fewest(start, order)
        chosen, raw, drop = found
        total = sum(told[node]["cost_us"] for node in chosen)
        reasons = {}
        for node in chosen:
            row = told[node]
            reasons[node] = {
                **row,
                "why": f"in 8 bits it alone moves the answers by {row['divergence']:.2g} "
                f"{self._judge.unit}; in float it costs {row['cost_us']:.1f} µs",
            }
        trial = _Trial(
            start.core, start.ranges, raw, self._judge.divergence(raw), drop, reasons, total,
            dict(start.steps),
        )  # fmt: skip
        self._trials.append(
            {
                "name": f"{len(chosen)} of {len(layers)} layers in float",
                "divergence": trial.divergence,
                "drop": drop,
            }
        )
        return trial

    def _fewest(self, start: _Trial, order: list[str]) -> tuple[list[str], bytes, float]:
        """Halve the interval: how many layers, in this order, hold the gate."""
        low, high = 0, len(order)
        raw = self._build(start, order)
        best = (order, raw, self._judge.drop(raw))
        while high - low > 1:
            middle = (low + high) // 2
            raw = self._build(start, order[:middle])
            drop = self._judge.drop(raw)
            if drop <= self._judge.max_drop + 1e-9:
                high, best = middle, (order[:middle], raw, drop)
            else:
                low = middle
        return best

    def _build(self, start: _Trial, float_layers: Collection[str]) -> bytes:
        nodes = {*float_layers, *followers(self._prepared.core, float_layers, self._layers())}
        return serialize(self._prepared.build(start.ranges, float_nodes=nodes, core=start.core))

    def _tell(self, best: _Trial) -> dict[str, Any]:
        never = [
            {"layer": layer, "why": "onnxruntime has no 8-bit kernel for it on processors"}
            for layer in self._unsupported_layers()
        ]
        return {
            "method": best.steps["method"],
            "equalized_pairs": best.steps.get("equalized_pairs", 0),
            "biases_corrected": best.steps.get("biases_corrected", False),
            "trained": best.steps.get("trained"),
            "divergence": best.divergence,
            "drop": best.drop,
            "holds": self._holds(best),
            "float_layers": [*never, *best.float_nodes.values()],
            "trials": self._trials,
            "notes": self._notes,
        }

    def _unsupported_layers(self) -> list[str]:
        never = set(unsupported_nodes(self._prepared.core))
        return [
            node.input[1].removesuffix(".weight")
            for node in self._prepared.core.graph.node
            if node.name in never
        ]


def followers(
    core: onnx.ModelProto, float_layers: Collection[str], layers: Collection[str]
) -> list[str]:
    """Return the other nodes that have float layers only in front of them.

    Between float layers nothing is won by 8 bits, and accuracy is lost.
    """
    chosen, every = set(float_layers), set(layers)
    sources: dict[str, set[str]] = {}
    found = []
    for node in core.graph.node:
        if node.name in every:
            before = {node.name}
        else:
            before = set().union(*(sources.get(name, set()) for name in node.input))
            if (before or every) <= chosen:
                found.append(node.name)
        for name in node.output:
            sources[name] = before
    return found


def _work(core: onnx.ModelProto) -> dict[str, float]:
    """Return node → multiplications of one image, roughly."""
    graph = core.graph
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in graph.initializer}
    places = {
        value.name: int(np.prod([d.dim_value or 1 for d in value.type.tensor_type.shape.dim[2:]]))
        for value in (*graph.value_info, *graph.output)
    }
    return {
        node.name: float(sizes.get(node.input[1], 0) * places.get(node.output[0], 1))
        for node in graph.node
        if len(node.input) > 1
    }


__all__ = ["Costs", "Found", "ImageJudge", "Judge", "Train", "layer_costs_of", "search"]
