"""What an inference server tells Prometheus of its models: Triton's names, and what they lack.

Nothing is counted here: at a scrape the engine's own statistics are read, so requests pay nothing.
Only what is loaded is told, so that a model which is deleted leaves no series behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from pollard.services.common.call_metrics import cumulated
from pollard.services.inference.engine import Engine
from pollard.services.inference.loader import Loader
from pollard.services.inference.revision import LoadedRevision

_REVISION = ["model", "version"]

_BATCH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

_TRITON: Mapping[str, str] = {
    "nv_inference_request_success": "Requests that were answered.",
    "nv_inference_count": "Rows that were run: a request with a batch of n counts n.",
    "nv_inference_exec_count": "Runs of the model: a batch of several requests is one.",
    "nv_inference_request_duration_us": "Time of the answered requests in the engine, in all.",
    "nv_inference_queue_duration_us": "Time that requests waited for a worker, in all.",
    "nv_inference_compute_input_duration_us": "Time to join the inputs of batches, in all.",
    "nv_inference_compute_infer_duration_us": "Time to run the model, in all.",
    "nv_inference_compute_output_duration_us": "Time to split the outputs of batches, in all.",
}


class EngineMetrics(Collector):
    """The models of one engine."""

    def __init__(self, engine: Engine, loader: Loader) -> None:
        """Read `engine` and `loader` at each scrape."""
        self._engine = engine
        self._loader = loader

    def collect(self) -> Iterable[Metric]:
        """Return what is known of every loaded revision."""
        revisions = [
            ([model.name, str(number)], revision)
            for model in self._engine.table.models.values()
            for number, revision in model.revisions.items()
        ]
        yield from _triton(revisions)
        yield from _of_revisions(revisions)
        yield from self._of_models()
        yield from self._of_loads()

    def _of_models(self) -> Iterator[Metric]:
        switches = CounterMetricFamily(
            "pollard_inference_switches",
            "Changes of what serves a model: revisions, routes, shadows.",
            labels=["model"],
        )
        weights = GaugeMetricFamily(
            "pollard_inference_route_weight",
            "Share of an alias's requests that a revision gets, 0 to 1.",
            labels=["model", "alias", "version"],
        )
        for name, model in self._engine.table.models.items():
            switches.add_metric([name], self._engine.switches.get(name, 0))
            for alias, targets in model.routes.items():
                whole = sum(weight for _, weight in targets)
                for number, weight in targets:
                    weights.add_metric([name, alias, str(number)], weight / whole if whole else 0)
        yield switches
        yield weights

    def _of_loads(self) -> Iterator[Metric]:
        loads = CounterMetricFamily(
            "pollard_inference_loads",
            "Loads that have ended, by outcome: loaded, failed, abandoned.",
            labels=["outcome"],
        )
        for outcome, count in self._loader.outcomes.items():
            loads.add_metric([outcome], count)
        yield loads
        took = HistogramMetricFamily(
            "pollard_inference_load_seconds", "Time of the loads that succeeded."
        )
        took.add_metric([], self._loader.durations.cumulated(), self._loader.durations.total)
        yield took


def _triton(revisions: list[tuple[list[str], LoadedRevision]]) -> Iterator[Metric]:
    # Triton's counters do not end in _total, which the family of counters would add.
    families = {name: UnknownMetricFamily(name, words, labels=_REVISION)
                for name, words in _TRITON.items()}  # fmt: skip
    failures = UnknownMetricFamily(
        "nv_inference_request_failure",
        "Requests that failed, by reason: REJECTED (queue, deadline), CANCELED, BACKEND, OTHER.",
        labels=[*_REVISION, "reason"],
    )
    pending = GaugeMetricFamily(
        "nv_inference_pending_request_count",
        "Requests that wait for a worker.",
        labels=_REVISION,
    )
    loading = GaugeMetricFamily(
        "nv_model_load_duration_secs", "Time that the load took.", labels=_REVISION
    )
    for labels, revision in revisions:
        for name, value in revision.statistics.totals().items():
            families[name].add_metric(labels, value)
        for reason, count in revision.statistics.failures.items():
            failures.add_metric([*labels, reason], count)
        pending.add_metric(labels, revision.waiting)
        loading.add_metric(labels, revision.info.load_seconds)
    yield from families.values()
    yield failures
    yield pending
    yield loading


def _of_revisions(revisions: list[tuple[list[str], LoadedRevision]]) -> Iterator[Metric]:
    seconds = HistogramMetricFamily(
        "pollard_inference_request_seconds",
        "Time of the answered requests in the engine.",
        labels=_REVISION,
    )
    batches = HistogramMetricFamily(
        "pollard_inference_batch_size", "Rows of a run of the model.", labels=_REVISION
    )
    in_flight = GaugeMetricFamily(
        "pollard_inference_in_flight", "Requests that are being answered.", labels=_REVISION
    )
    size = GaugeMetricFamily(
        "pollard_inference_model_bytes", "Size of the revision's files.", labels=_REVISION
    )
    workers = GaugeMetricFamily(
        "pollard_inference_workers", "Threads that run a revision's requests.", labels=_REVISION
    )
    for labels, revision in revisions:
        seconds.add_metric(labels, *revision.counters.to_seconds())
        sizes = revision.statistics.batch_sizes()
        counts = [0] * (len(_BATCH_BOUNDS) + 1)
        for rows, runs in sizes:
            place = next(
                (at for at, bound in enumerate(_BATCH_BOUNDS) if rows <= bound), len(_BATCH_BOUNDS)
            )
            counts[place] += runs
        total = float(sum(rows * runs for rows, runs in sizes))
        batches.add_metric(labels, cumulated(_BATCH_BOUNDS, counts), total)
        in_flight.add_metric(labels, revision.in_flight)
        size.add_metric(labels, revision.info.size_bytes)
        workers.add_metric(labels, revision.workers)
    yield seconds
    yield batches
    yield in_flight
    yield size
    yield workers
