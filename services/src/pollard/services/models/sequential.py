"""Tests that may be looked at at any time: mixtures of likelihood ratios.

Such a ratio is, while the revision is not worse, expected to stay at 1 or below whenever one looks;
that it ever reaches 1/α has a probability of at most α (Ville's inequality). All are given as
natural logarithms.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

ODDS = np.array([1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0])
"""How many times more often the new revision might fail than the base revision."""

_RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9)
_MULTIPLES = (1.5, 2.0, 3.0, 5.0, 10.0, 30.0)


def needed(alpha: float) -> float:
    """Return what a ratio must reach."""
    return math.log(1 / alpha)


def against_limit(trials: int, failed: int, limit: float) -> float:
    """Return how much the failures speak for a higher rate than ``limit``, above 0 and below 1."""
    if not failed:
        return -math.inf
    candidates = [rate for rate in _RATES if rate > 1.5 * limit]
    candidates += [limit * multiple for multiple in _MULTIPLES if limit * multiple < 0.95]
    rates = np.array(candidates or [(1 + limit) / 2])
    ratios = failed * np.log(rates / limit) + (trials - failed) * (
        np.log1p(-rates) - math.log1p(-limit)
    )
    return mixture(ratios)


def mixture(ratios: NDArray[np.float64]) -> float:
    """Return the mixture of several ratios, in equal parts."""
    highest = float(ratios.max())
    return highest + math.log(float(np.exp(ratios - highest).mean()))


def against_equal(
    requests: int, failed: int, base_requests: int, base_failed: int
) -> NDArray[np.float64]:
    """Return how much failures speak for each of the odds, rather than for equal ones.

    Given how many failed in all, how they fall on the two revisions follows
    Fisher's noncentral hypergeometric distribution.
    """
    whole = failed + base_failed
    if not whole:
        return np.zeros(len(ODDS))
    splits = range(max(0, whole - base_requests), min(whole, requests) + 1)
    weights = np.array(
        [_log_choose(requests, k) + _log_choose(base_requests, whole - k) for k in splits]
    )
    weights -= weights.max()
    log_odds = np.log(ODDS)
    tilted = weights + np.outer(log_odds, np.array(splits, dtype=np.float64))
    highest = tilted.max(axis=1)
    sums = highest + np.log(np.exp(tilted - highest[:, None]).sum(axis=1))
    result: NDArray[np.float64] = failed * log_odds - sums + math.log(np.exp(weights).sum())
    return result


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
