"""What was seen of a revision: requests, images and copies, counted and added up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.models.histograms import Latencies


@dataclass
class Tally:
    """Requests to one revision. Those that failed by the client's doing are not in it."""

    succeeded: int = 0
    failed: int = 0
    latencies: Latencies = field(default_factory=Latencies)

    @property
    def requests(self) -> int:
        """Requests that were answered or failed by the server's doing."""
        return self.succeeded + self.failed

    @property
    def error_rate(self) -> float:
        """Share of the requests that failed."""
        return self.failed / self.requests if self.requests else 0.0

    def add(self, other: Tally) -> None:
        """Add what was seen since."""
        self.succeeded += other.succeeded
        self.failed += other.failed
        self.latencies.add(other.latencies)

    def to_json(self) -> dict[str, Any]:
        """Return it in a form that can be stored."""
        return {
            "succeeded": self.succeeded,
            "failed": self.failed,
            "latencies": self.latencies.to_json(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        """Return what was stored."""
        latencies = Latencies.from_json(value["latencies"])
        return cls(value["succeeded"], value["failed"], latencies)


@dataclass
class Copies:
    """Copies of the base revision's requests that ran on the new one."""

    compared: int = 0
    items: int = 0
    agreed: int = 0
    dropped: int = 0
    failed: int = 0
    distances: Latencies = field(default_factory=Latencies)
    """In millionths."""

    @property
    def agreement(self) -> float:
        """Share of the items that agreed."""
        return self.agreed / self.items if self.items else 0.0

    def add(self, other: Copies) -> None:
        """Add what was seen since."""
        self.compared += other.compared
        self.items += other.items
        self.agreed += other.agreed
        self.dropped += other.dropped
        self.failed += other.failed
        self.distances.add(other.distances)

    def to_json(self) -> dict[str, Any]:
        """Return it in a form that can be stored."""
        return vars(self) | {"distances": self.distances.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Copies:
        """Return what was stored."""
        return cls(**(value | {"distances": Latencies.from_json(value["distances"])}))


@dataclass
class Seen:
    """What one server saw of one revision between two reports."""

    tally: Tally = field(default_factory=Tally)
    copies: Copies = field(default_factory=Copies)

    @classmethod
    def of(cls, counters: fleet_pb.Counters) -> Seen:
        """Return what a server has counted in all."""
        shadow = counters.shadow
        return cls(
            Tally(counters.succeeded, counters.failed, Latencies.of(counters.latency)),
            Copies(
                shadow.compared,
                shadow.items,
                shadow.agreed,
                shadow.dropped,
                shadow.failed,
                Latencies.of(shadow.distance),
            ),
        )

    def since(self, earlier: Seen) -> Seen | None:
        """Return what was added after ``earlier``; None if it is no later state of the same."""
        latencies = self.tally.latencies.since(earlier.tally.latencies)
        distances = self.copies.distances.since(earlier.copies.distances)
        if latencies is None or distances is None:
            return None
        now, before = self.copies, earlier.copies
        added = Seen(
            Tally(
                self.tally.succeeded - earlier.tally.succeeded,
                self.tally.failed - earlier.tally.failed,
                latencies,
            ),
            Copies(
                now.compared - before.compared,
                now.items - before.items,
                now.agreed - before.agreed,
                now.dropped - before.dropped,
                now.failed - before.failed,
                distances,
            ),
        )
        copies = added.copies
        numbers = (
            *(added.tally.succeeded, added.tally.failed, copies.compared, copies.items),
            *(copies.agreed, copies.dropped, copies.failed),
        )
        return added if min(numbers) >= 0 else None
