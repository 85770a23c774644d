"""What the requests of one loaded revision cost, in the form in which the protocol reports it.

Workers note on each request when its run began and ended; the event loop's thread adds the notes
up, so nothing here needs a lock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.common.telemetry.traces import Span

REJECTED, CANCELED, BACKEND, OTHER = "REJECTED", "CANCELED", "BACKEND", "OTHER"
REASONS = (REJECTED, CANCELED, BACKEND, OTHER)
"""Why requests fail: no place or time for them, their client's going, the model, anything else."""


@dataclass(slots=True)
class Timing:
    """One run of the model, on the clock of `time.perf_counter_ns`; shared by its requests."""

    batch: int
    """Size of the batch that was run; 1 if the model does not batch."""
    started: int
    """When a worker took it up."""
    ready: int = 0
    """When its inputs were joined."""
    run: int = 0
    """When the model had run."""
    split: int = 0
    """When its outputs were split."""
    counted: bool = False
    requests: int = 1
    """Requests that were joined."""
    spans: Sequence[Span] = ()
    """Of those of its requests that are traced."""


@dataclass(slots=True)
class _Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns

    def to_proto(self) -> pb.StatisticDuration:
        return pb.StatisticDuration(count=self.count, ns=self.ns)


@dataclass(slots=True)
class _Compute:
    input: _Duration = field(default_factory=_Duration)
    infer: _Duration = field(default_factory=_Duration)
    output: _Duration = field(default_factory=_Duration)

    def add(self, timing: Timing) -> None:
        self.input.add(timing.ready - timing.started)
        self.infer.add(timing.run - timing.ready)
        self.output.add(timing.split - timing.run)


class RevisionStatistics:
    """Counts and durations since the revision was loaded. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.inferences = 0
        self.executions = 0
        self.last_inference_ms = 0
        self._success = _Duration()
        self._fail = _Duration()
        self._queue = _Duration()
        self._compute = _Compute()
        self._batches: dict[int, _Compute] = {}
        self.failures: dict[str, int] = dict.fromkeys(REASONS, 0)
        """Requests that failed, by reason."""

    def succeed(self, rows: int, arrived: int, timing: Timing) -> None:
        """Count a request that was answered.

        Args:
            rows: Its batch size; 1 if the model does not batch.
            arrived: When it reached the engine, on the clock of `time.perf_counter_ns`.
            timing: Of the run that it was part of.
        """
        # On the way of every request, hence without calls.
        self.inferences += rows
        success, queue, compute = self._success, self._queue, self._compute
        success.count += 1
        success.ns += time.perf_counter_ns() - arrived
        queue.count += 1
        queue.ns += max(0, timing.started - arrived)
        compute.input.count += 1
        compute.input.ns += timing.ready - timing.started
        compute.infer.count += 1
        compute.infer.ns += timing.run - timing.ready
        compute.output.count += 1
        compute.output.ns += timing.split - timing.run
        if not timing.counted:
            timing.counted = True
            self.executions += 1
            self.last_inference_ms = time.time_ns() // 1_000_000
            self._batches.setdefault(timing.batch, _Compute()).add(timing)

    def fail(self, arrived: int, reason: str) -> None:
        """Count a request that fitted the model and failed all the same.

        Args:
            arrived: When it reached the engine, on the clock of `time.perf_counter_ns`.
            reason: One of `REASONS`.
        """
        self._fail.add(time.perf_counter_ns() - arrived)
        self.failures[reason] += 1

    def totals(self) -> dict[str, float]:
        """Return what Triton's metrics count, under their names; durations in microseconds."""
        success, compute = self._success, self._compute
        return {
            "nv_inference_request_success": success.count,
            "nv_inference_count": self.inferences,
            "nv_inference_exec_count": self.executions,
            "nv_inference_request_duration_us": success.ns // 1000,
            "nv_inference_queue_duration_us": self._queue.ns // 1000,
            "nv_inference_compute_input_duration_us": compute.input.ns // 1000,
            "nv_inference_compute_infer_duration_us": compute.infer.ns // 1000,
            "nv_inference_compute_output_duration_us": compute.output.ns // 1000,
        }

    def batch_sizes(self) -> list[tuple[int, int]]:
        """Return the sizes of the batches that were run, each with how often."""
        return [(size, compute.infer.count) for size, compute in sorted(self._batches.items())]

    def to_proto(self, model: str, version: str) -> pb.ModelStatistics:
        """Return the statistics as they stand."""
        return pb.ModelStatistics(
            name=model,
            version=version,
            last_inference=self.last_inference_ms,
            inference_count=self.inferences,
            execution_count=self.executions,
            inference_stats=pb.InferStatistics(
                success=self._success.to_proto(),
                fail=self._fail.to_proto(),
                queue=self._queue.to_proto(),
                compute_input=self._compute.input.to_proto(),
                compute_infer=self._compute.infer.to_proto(),
                compute_output=self._compute.output.to_proto(),
                cache_hit=pb.StatisticDuration(),
                cache_miss=pb.StatisticDuration(),
            ),
            batch_stats=[
                pb.InferBatchStatistics(
                    batch_size=size,
                    compute_input=compute.input.to_proto(),
                    compute_infer=compute.infer.to_proto(),
                    compute_output=compute.output.to_proto(),
                )
                for size, compute in sorted(self._batches.items())
            ],
        )
