"""The gates of a rollout: is the new revision worse than the one beside it, and how sure is that?

The new revision is compared with what the base revision did *at the same time*, and looked at
again with every report. Both make naive thresholds misfire: a fixed limit is crossed by chance
sooner or later if one looks often enough. So:

* Errors are tested by mixtures of likelihood ratios. Such a ratio is, while the revision is not
  worse, expected to stay at 1 or below whenever one looks; that it ever reaches 1/α has a
  probability of at most α (Ville's inequality). Two must reach it: one against the limit, and one
  against the base revision, stratified by server and report, so that an outage that hits both
  revisions alike is no evidence against either.
* Latencies are tested by order statistics, which hold for every distribution, at few looks that
  lie further and further apart; each spends a part of α.

All of it together calls a revision that is not worse bad with a probability of at most 1 % in a
whole rollout, if requests fail and take their time independently of one another; concurrent
comparison keeps it low where they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pollard.services.common.errors import FailedPrecondition
from pollard.services.models.histograms import Latencies

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

_SHARE_ERRORS, _SHARE_P99, _SHARE_GROSS = 0.5, 0.4, 0.1
"""How α is divided among the gates."""

_ODDS = np.array([1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0])
"""How many times more often the new revision might fail than the base revision."""

_RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)
_MULTIPLES = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Limits:
    """What the gates allow."""

    max_error_rate: float
    max_p99_ratio: float
    steps: int
    """Number of steps that are judged; α is divided among them."""


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


class Judge:
    """Collects what was seen in one step of a rollout, and judges it."""

    def __init__(self, limits: Limits, revision: int, base: int) -> None:
        self.canary = Tally()
        self.base = Tally()
        self._limits = limits
        self._revision = revision
        self._base_revision = base
        self._alpha = ALPHA / max(1, limits.steps)
        self._against_base: NDArray[np.float64] = np.zeros(len(_ODDS))
        self._gross_look = 0
        self._gross_next = _GROSS_FROM
        self._p99_look = 0
        self._p99_next = P99_FROM

    def observe(self, canary: Tally, base: Tally) -> None:
        """Take in what one server saw between two reports."""
        self.canary.add(canary)
        self.base.add(base)
        if canary.requests and base.requests:
            self._against_base += _log_ratios(
                canary.requests, canary.failed, base.requests, base.failed
            )

    def verdict(self) -> FailedPrecondition | None:
        """Return which gate fails, with its numbers; None when none does."""
        return self._errors() or self._gross() or self._p99()

    def _errors(self) -> FailedPrecondition | None:
        limit = self._limits.max_error_rate
        canary, base = self.canary, self.base
        needed = math.log(1 / (self._alpha * _SHARE_ERRORS))
        if limit >= 1 or _against_limit(canary.requests, canary.failed, limit) < needed:
            return None
        # Without any request beside it there is nothing to compare with but the limit.
        if base.requests and _mixture(self._against_base) < needed:
            return None
        return FailedPrecondition(
            f"gate max_error_rate: {canary.failed} of {canary.requests} requests to revision "
            f"{self._revision} failed ({canary.error_rate:.2%}), {base.failed} of {base.requests} "
            f"to revision {self._base_revision} at the same time ({base.error_rate:.2%}); the "
            f"limit is {limit:.2%}",
            reason="GATE_ERROR_RATE",
            gate="max_error_rate",
            limit=limit,
            revision=self._revision,
            requests=canary.requests,
            failed=canary.failed,
            base_revision=self._base_revision,
            base_requests=base.requests,
            base_failed=base.failed,
        )

    def _gross(self) -> FailedPrecondition | None:
        if self.canary.latencies.total < self._gross_next:
            return None
        self._gross_look += 1
        self._gross_next = math.ceil(self.canary.latencies.total * _GROSS_GROWTH)
        alpha = self._alpha * _SHARE_GROSS * 6 / (math.pi * self._gross_look) ** 2
        ratio = max(GROSS_RATIO, self._limits.max_p99_ratio)
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
        return self._slower(0.99, self._limits.max_p99_ratio, alpha, "GATE_P99_RATIO")

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
            f"gate max_p99_ratio: the {name} latency of revision {self._revision} is at least "
            f"{at_least:.3g} ms ({canary.total} requests), that of revision "
            f"{self._base_revision} at most {at_most:.3g} ms at the same time ({base.total} "
            f"requests): {at_least / at_most:.2f} times as long or more; the limit "
            f"{'for p99 ' if quantile == 0.99 else f'for a gross difference of the {name} '}"
            f"is {limit:g}",
            reason=reason,
            gate="max_p99_ratio",
            quantile=quantile,
            limit=limit,
            revision=self._revision,
            requests=canary.total,
            at_least_ms=f"{at_least:.6g}",
            base_revision=self._base_revision,
            base_requests=base.total,
            base_at_most_ms=f"{at_most:.6g}",
        )


def _against_limit(requests: int, failed: int, limit: float) -> float:
    """Return the logarithm of the mixture of likelihood ratios of higher rates to ``limit``."""
    if not failed:
        return -math.inf
    candidates = [rate for rate in _RATES if rate > 1.5 * limit]
    candidates += [limit * multiple for multiple in _MULTIPLES if limit * multiple < 0.95]
    rates = np.array(candidates or [(1 + limit) / 2])
    ratios = failed * np.log(rates / limit) + (requests - failed) * (
        np.log1p(-rates) - math.log1p(-limit)
    )
    return _mixture(ratios)


def _mixture(ratios: NDArray[np.float64]) -> float:
    highest = float(ratios.max())
    return highest + math.log(float(np.exp(ratios - highest).mean()))


def _log_ratios(
    requests: int, failed: int, base_requests: int, base_failed: int
) -> NDArray[np.float64]:
    """Return log-likelihood ratios of each of the odds to equal ones.

    Given how many failed in all, how they fall on the two revisions follows
    Fisher's noncentral hypergeometric distribution.
    """
    whole = failed + base_failed
    if not whole:
        return np.zeros(len(_ODDS))
    splits = range(max(0, whole - base_requests), min(whole, requests) + 1)
    weights = np.array(
        [_log_choose(requests, k) + _log_choose(base_requests, whole - k) for k in splits]
    )
    weights -= weights.max()
    log_odds = np.log(_ODDS)
    tilted = weights + np.outer(log_odds, np.array(splits, dtype=np.float64))
    highest = tilted.max(axis=1)
    sums = highest + np.log(np.exp(tilted - highest[:, None]).sum(axis=1))
    result: NDArray[np.float64] = failed * log_odds - sums + math.log(np.exp(weights).sum())
    return result


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
