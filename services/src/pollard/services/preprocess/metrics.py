"""What a preprocess server tells Prometheus: its decoders, and the images of each revision.

Only what is served is told, so that a model which is deleted leaves no series behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pollard.services.preprocess.counts import Counts
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.snapshot import Current

_REVISION = ["model", "version"]


class PreprocessMetrics(Collector):
    """The decode workers and the revisions of one server."""

    def __init__(self, pool: DecodePool, current: Current, counts: Counts) -> None:
        """Read them at each scrape."""
        self._pool = pool
        self._current = current
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        """Return the counts as they stand."""
        yield from self._of_decoders()
        yield from self._of_revisions()

    def _of_decoders(self) -> Iterator[Metric]:
        pool = self._pool
        for name, words, value in (
            ("pollard_decode_workers", "Decode workers that are alive.", len(pool.pids)),
            ("pollard_decode_busy", "Images that decode workers have in hand.", pool.in_work),
            ("pollard_decode_waiting", "Images that wait for a decode worker.", pool.waiting),
            ("pollard_decode_waiting_bytes", "Their size.", pool.waiting_bytes),
        ):
            yield GaugeMetricFamily(name, words, value=value)
        images = CounterMetricFamily(
            "pollard_decode_images",
            "Images that were given to the decoders, by outcome: decoded, refused (not an image "
            "that can be had), timeout, crashed, busy (no place in the queue), canceled (the "
            "caller had gone).",
            labels=["outcome"],
        )
        for outcome, count in pool.outcomes.items():
            images.add_metric([outcome], count)
        yield images
        yield CounterMetricFamily(
            "pollard_decode_worker_restarts",
            "Decode workers that ended or were killed, and were replaced.",
            value=pool.replaced,
        )
        yield CounterMetricFamily(
            "pollard_decode_messages",
            "Lines that libraries, such as libtiff, had to say of images; they are not kept.",
            value=pool.messages,
        )
        took = HistogramMetricFamily(
            "pollard_decode_seconds", "Time to decode and transform an image, without waiting."
        )
        took.add_metric([], pool.durations.cumulated(), pool.durations.total)
        yield took

    def _of_revisions(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "pollard_vision_requests",
            "Images of a revision, by outcome: succeeded, failed (its own preprocessing could not "
            "take the image), rejected (not an image that can be had).",
            labels=[*_REVISION, "outcome"],
        )
        seconds = HistogramMetricFamily(
            "pollard_vision_request_seconds",
            "Time of the answered images, from their coming to the answer.",
            labels=_REVISION,
        )
        for model in self._current.snapshot.models.values():
            for number in model.revisions:
                counters = self._counts.known(model.name, number)
                if counters is None:
                    continue
                labels = [model.name, str(number)]
                requests.add_metric([*labels, "succeeded"], counters.succeeded)
                requests.add_metric([*labels, "failed"], counters.failed)
                requests.add_metric([*labels, "rejected"], counters.rejected)
                took = self._counts.durations.get((model.name, number))
                if took is not None:
                    seconds.add_metric(labels, took.cumulated(), took.total)
        yield requests
        yield seconds
