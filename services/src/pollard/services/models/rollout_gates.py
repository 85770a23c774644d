"""The gates of a rollout: is the new revision worse than the one beside it, and how sure is that?

The new revision is compared with what the base revision did *at the same time*, and looked at
again with every report. Both make naive thresholds misfire: a fixed limit is crossed by chance
sooner or later if one looks often enough. So:

* Errors are tested by mixtures of likelihood ratios (`sequential`). Two must speak against the
  revision: one against the limit, and one against the base revision, stratified by server and
  report, so that an outage that hits both revisions alike is no evidence against either. Errors of
  inference servers and of preprocess servers are two such tests.
* Copies of the base revision's requests (shadows) are tested likewise, for their failures and for
  their answers, against the limits alone: the base revision answered every one of them.
* Latencies are tested by order statistics, which hold for every distribution, at few looks that
  lie further and further apart; each spends a part of α.

All of it together calls a revision that is not worse bad with a probability of at most 1 % in a
whole rollout, if requests fail, take their time and agree independently of one another; concurrent
comparison keeps it low where they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.services.common.errors import FailedPrecondition
from pollard.services.models.rollout_tallies import Copies, Tally
from pollard.services.models.sequential import (
    ODDS,
    against_equal,
    against_limit,
    mixture,
    needed,
)

ALPHA = 0.01
"""Probability of rolling back a revision that is not worse, over a whole rollout."""

P99_FROM = 2000
"""Requests to the new revision before a 99th percentile says anything."""

GROSS_RATIO = 2.0
"""Ratio of typical latencies that is called gross, unless the p99 may grow by more."""

_GROSS_FROM = 60
_GROSS_QUANTILES = (0.5, 0.75)
_GROSS_GROWTH = 1.25
_P99_GROWTH = 1.5

_SHARE_ERRORS, _SHARE_IMAGES, _SHARE_COPIES = 0.4, 0.1, 0.1
_SHARE_P99, _SHARE_GROSS, _SHARE_AGREEMENT = 0.2, 0.1, 0.1
"""How α is divided among the tests: 1 in all."""


@dataclass(frozen=True)
class Limits:
    """What the gates allow."""

    max_error_rate: float
    max_p99_ratio: float
    steps: int
    """Number of steps that are judged; α is divided among them."""
    min_agreement: float = 0.0
    """0 does not judge it."""


@dataclass
class Pair:
    """Requests to the new revision and, at the same time, to the base revision."""

    canary: Tally = field(default_factory=Tally)
    base: Tally = field(default_factory=Tally)
    against_base: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(ODDS)))

    def add(self, canary: Tally, base: Tally) -> None:
        """Take in what one server saw between two reports."""
        self.canary.add(canary)
        self.base.add(base)
        if canary.requests and base.requests:
            self.against_base += against_equal(
                canary.requests, canary.failed, base.requests, base.failed
            )

    def fails_more(self, limit: float, alpha: float) -> bool:
        """Tell whether more than the limit fail, and more than of the base revision's requests."""
        enough, canary = needed(alpha), self.canary
        if limit >= 1 or against_limit(canary.requests, canary.failed, limit) < enough:
            return False
        # Without any request beside it there is nothing to compare with but the limit.
        return not self.base.requests or mixture(self.against_base) >= enough

    def to_json(self) -> dict[str, Any]:
        """Return it in a form that can be stored."""
        return {
            "canary": self.canary.to_json(),
            "base": self.base.to_json(),
            "against_base": self.against_base.tolist(),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Pair:
        """Return what was stored."""
        canary, base = Tally.from_json(value["canary"]), Tally.from_json(value["base"])
        return cls(canary, base, np.array(value["against_base"], np.float64))


class Judge:
    """Collects what was seen in one step of a rollout, and judges it."""

    def __init__(self, limits: Limits, revision: int, base: int) -> None:
        self.requests = Pair()
        """At inference servers."""
        self.images = Pair()
        """At preprocess servers; what the model failed is not in it."""
        self.copies = Copies()
        self.limits = limits
        self.revision = revision
        self.base_revision = base
        self._alpha = ALPHA / max(1, limits.steps)
        self._gross_look = 0
        self._gross_next = _GROSS_FROM
        self._p99_look = 0
        self._p99_next = P99_FROM

    @property
    def canary(self) -> Tally:
        """Requests to the new revision at inference servers."""
        return self.requests.canary

    @property
    def base(self) -> Tally:
        """Requests to the base revision at inference servers."""
        return self.requests.base

    def observe(self, canary: Tally, base: Tally) -> None:
        """Take in what one inference server saw between two reports."""
        self.requests.add(canary, base)

    def to_json(self) -> dict[str, Any]:
        """Return all that was seen in a form that can be stored."""
        return {
            "requests": self.requests.to_json(),
            "images": self.images.to_json(),
            "copies": self.copies.to_json(),
            "looks": [self._gross_look, self._gross_next, self._p99_look, self._p99_next],
        }

    def restore(self, value: dict[str, Any]) -> None:
        """Go on from what was stored."""
        self.requests = Pair.from_json(value["requests"])
        self.images = Pair.from_json(value["images"])
        self.copies = Copies.from_json(value["copies"])
        self._gross_look, self._gross_next, self._p99_look, self._p99_next = value["looks"]

    def verdict(self) -> FailedPrecondition | None:
        """Return which gate fails, with its numbers; None when none does."""
        return (
            self._errors(self.requests, _SHARE_ERRORS, "requests to")
            or self._errors(self.images, _SHARE_IMAGES, "images, in the preprocess service, by")
            or self._copies()
            or self._agreement()
            or self._gross()
            or self._p99()
        )

    def _errors(self, pair: Pair, share: float, what: str) -> FailedPrecondition | None:
        limit = self.limits.max_error_rate
        if not pair.fails_more(limit, self._alpha * share):
            return None
        canary, base = pair.canary, pair.base
        return FailedPrecondition(
            f"gate max_error_rate: {canary.failed} of {canary.requests} {what} revision "
            f"{self.revision} failed ({canary.error_rate:.2%}), {base.failed} of {base.requests} "
            f"to revision {self.base_revision} at the same time ({base.error_rate:.2%}); the "
            f"limit is {limit:.2%}",
            reason="GATE_ERROR_RATE",
            gate="max_error_rate",
            limit=limit,
            revision=self.revision,
            requests=canary.requests,
            failed=canary.failed,
            base_revision=self.base_revision,
            base_requests=base.requests,
            base_failed=base.failed,
        )

    def _copies(self) -> FailedPrecondition | None:
        limit, failed = self.limits.max_error_rate, self.copies.failed
        run = self.copies.compared + failed
        enough = needed(self._alpha * _SHARE_COPIES)
        if limit >= 1 or against_limit(run, failed, limit) < enough:
            return None
        return FailedPrecondition(
            f"gate max_error_rate: revision {self.revision} failed {failed} of {run} shadows "
            f"({failed / run:.2%}) of requests that revision {self.base_revision} had answered; "
            f"the limit is {limit:.2%}",
            reason="GATE_SHADOW_ERROR_RATE",
            gate="max_error_rate",
            limit=limit,
            revision=self.revision,
            shadows=run,
            failed=failed,
            base_revision=self.base_revision,
        )

    def _agreement(self) -> FailedPrecondition | None:
        limit, copies = self.limits.min_agreement, self.copies
        if limit <= 0:
            return None
        differing = copies.items - copies.agreed
        # A limit of 1 allows none: the first that differs is certain.
        allowed = max(1 - limit, 1e-9)
        enough = needed(self._alpha * _SHARE_AGREEMENT)
        if against_limit(copies.items, differing, allowed) < enough:
            return None
        return FailedPrecondition(
            f"gate min_agreement: revision {self.revision} gives the answer of revision "
            f"{self.base_revision} for {copies.agreed} of {copies.items} items "
            f"({copies.agreement:.2%}); the limit is {limit:.2%}",
            reason="GATE_AGREEMENT",
            gate="min_agreement",
            limit=limit,
            revision=self.revision,
            items=copies.items,
            agreed=copies.agreed,
            base_revision=self.base_revision,
        )

    def _gross(self) -> FailedPrecondition | None:
        if self.canary.latencies.total < self._gross_next:
            return None
        self._gross_look += 1
        self._gross_next = math.ceil(self.canary.latencies.total * _GROSS_GROWTH)
        alpha = self._alpha * _SHARE_GROSS * 6 / (math.pi * self._gross_look) ** 2
        ratio = max(GROSS_RATIO, self.limits.max_p99_ratio)
        for quantile in _GROSS_QUANTILES:
            found = self._slower(quantile, ratio, alpha / len(_GROSS_QUANTILES), "GATE_LATENCY")
            if found is not None:
                return found
        return None

    def _p99(self) -> FailedPrecondition | None:
        if min(self.canary.latencies.total, self.base.latencies.total) < self._p99_next:
            return None
        self._p99_look += 1
        self._p99_next = math.ceil(self.canary.latencies.total * _P99_GROWTH)
        alpha = self._alpha * _SHARE_P99 / 2**self._p99_look
        return self._slower(0.99, self.limits.max_p99_ratio, alpha, "GATE_P99_RATIO")

    def _slower(
        self, quantile: float, limit: float, alpha: float, reason: str
    ) -> FailedPrecondition | None:
        """Tell whether a quantile is certainly more than ``limit`` times the base revision's."""
        canary, base = self.canary.latencies, self.base.latencies
        if not canary.scale or not base.scale:
            return None
        scale = min(canary.scale, base.scale)
        if max(canary.scale, base.scale) % scale:
            return None
        canary.coarsen(scale)
        base.coarsen(scale)
        low = canary.at_least(quantile, alpha / 2)
        high = base.at_most(quantile, alpha / 2)
        if low is None or high is None or canary.edge(low) < limit * base.edge(high + 1):
            return None
        at_least, at_most = canary.edge(low) / 1000, base.edge(high + 1) / 1000
        name = f"p{quantile * 100:g}"
        return FailedPrecondition(
            f"gate max_p99_ratio: the {name} latency of revision {self.revision} is at least "
            f"{at_least:.3g} ms ({canary.total} requests), that of revision "
            f"{self.base_revision} at most {at_most:.3g} ms at the same time ({base.total} "
            f"requests): {at_least / at_most:.2f} times as long or more; the limit "
            f"{'for p99 ' if quantile == 0.99 else f'for a gross difference of the {name} '}"
            f"is {limit:g}",
            reason=reason,
            gate="max_p99_ratio",
            quantile=quantile,
            limit=limit,
            revision=self.revision,
            requests=canary.total,
            at_least_ms=f"{at_least:.6g}",
            base_revision=self.base_revision,
            base_requests=base.total,
            base_at_most_ms=f"{at_most:.6g}",
        )
