"""The gates of a rollout: how often they misfire, and how soon they find what is bad."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.models.histograms import Latencies, upper_tail
from pollard.services.models.rollout_gates import Judge, Limits
from pollard.services.models.rollout_tallies import Copies, Tally

LIMITS = Limits(max_error_rate=0.005, max_p99_ratio=1.2, steps=3)
STEPS = (0.05, 0.25, 0.5)
SCALE = 16


def tally(
    chance: np.random.Generator,
    requests: int,
    error_rate: float,
    slower: float,
    spread: float,
) -> Tally:
    failed = int(chance.binomial(requests, error_rate))
    values = slower * 1000 * np.exp(spread * chance.normal(size=requests - failed))
    buckets, counts = np.unique(np.floor(np.log2(values) * SCALE), return_counts=True)
    found = {int(bucket): int(count) for bucket, count in zip(buckets, counts, strict=True)}
    return Tally(requests - failed, failed, Latencies(SCALE, found))


@dataclass
class Traffic:
    """Requests of a whole rollout, in reports of two servers."""

    chance: np.random.Generator
    error_rate: float = 0.002
    base_error_rate: float = 0.002
    slower: float = 1.0
    spread: float = 0.5
    bursts: bool = True
    per_report: int = 400
    reports: int = 20
    seen: int = field(default=0)

    def rollout(self) -> str:
        """Why it was rolled back; empty if it was promoted."""
        for share in STEPS:
            judge = Judge(LIMITS, 2, 1)
            for _ in range(self.reports):
                # Now and then everything is slow, or fails, for both revisions alike.
                slow, failing = 1.0, 0.0
                if self.bursts:
                    slow = float(np.exp(0.1 * self.chance.normal()))
                    if self.chance.random() < 0.05:
                        slow *= 4
                    if self.chance.random() < 0.02:
                        failing = 0.1
                canary = int(self.chance.binomial(self.per_report, share))
                judge.observe(
                    tally(
                        self.chance,
                        canary,
                        self.error_rate + failing,
                        self.slower * slow,
                        self.spread,
                    ),
                    tally(
                        self.chance,
                        self.per_report - canary,
                        self.base_error_rate + failing,
                        slow,
                        self.spread,
                    ),
                )
                self.seen += canary
                failed = judge.verdict()
                if failed is not None:
                    return failed.reason
        return ""


@pytest.mark.long
@pytest.mark.parametrize("bursts", [False, True])
def test_hundreds_of_rollouts_of_an_identical_revision_are_promoted(bursts: bool) -> None:
    ends = [
        Traffic(np.random.default_rng(seed), bursts=bursts, per_report=300).rollout()
        for seed in range(150)
    ]
    ends += [
        Traffic(np.random.default_rng(seed), bursts=bursts, per_report=900, reports=12).rollout()
        for seed in range(500, 650)
    ]
    assert sum(bool(end) for end in ends) <= 3, [end for end in ends if end]


def test_a_revision_as_bad_as_its_base_is_not_to_blame() -> None:
    ends = [
        Traffic(np.random.default_rng(seed), error_rate=0.05, base_error_rate=0.05).rollout()
        for seed in range(100)
    ]
    assert sum(bool(end) for end in ends) <= 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"error_rate": 0.2}, "GATE_ERROR_RATE"),
        ({"slower": 3.0}, "GATE_LATENCY"),
        ({"slower": 3.0, "spread": 0.1}, "GATE_LATENCY"),
    ],
)
def test_a_grossly_bad_revision_is_found_within_200_requests(
    bad: dict[str, float], reason: str
) -> None:
    """Reports of 20 canary requests each; the last report may go beyond 200."""
    for seed in range(300):
        traffic = Traffic(np.random.default_rng(seed), bursts=False, **bad)
        assert traffic.rollout() == reason
        assert traffic.seen <= 200 + 40


@pytest.mark.parametrize("bad", [{"error_rate": 0.2}, {"slower": 3.0}])
def test_a_grossly_bad_revision_is_found_in_noise(bad: dict[str, float]) -> None:
    for seed in range(300):
        assert Traffic(np.random.default_rng(seed), **bad).rollout()


def test_a_tail_that_is_a_little_too_long_is_found_in_time() -> None:
    found = [
        Traffic(np.random.default_rng(seed), slower=1.6, per_report=2000).rollout()
        for seed in range(20)
    ]
    assert found == ["GATE_P99_RATIO"] * 20


def shadow_reports(
    chance: np.random.Generator, agreement: float, limit: float, *, failing: float = 0.0
) -> str:
    """Why a rollout is taken back for its shadows: four steps, each looked at 40 times."""
    for _ in range(4):
        judge = Judge(Limits(0.005, 1.2, 4, limit), 2, 1)
        for _ in range(40):
            copies = int(chance.integers(0, 60))
            failed = int(chance.binomial(copies, failing))
            items = copies - failed
            agreed = int(chance.binomial(items, agreement))
            judge.copies.add(Copies(items, items, agreed, 0, failed))
            found = judge.verdict()
            if found is not None:
                return found.reason
    return ""


@pytest.mark.parametrize(("agreement", "limit"), [(1.0, 0.98), (0.98, 0.96), (0.96, 0.96)])
def test_hundreds_of_rollouts_that_agree_as_they_should_are_promoted(
    agreement: float, limit: float
) -> None:
    """Also one that agrees no better than it must."""
    ends = [shadow_reports(np.random.default_rng(seed), agreement, limit) for seed in range(300)]
    assert sum(bool(end) for end in ends) <= 3, [end for end in ends if end]


def test_one_that_disagrees_or_fails_is_always_found() -> None:
    for seed in range(300):
        chance = np.random.default_rng(seed)
        assert shadow_reports(chance, 0.85, 0.96) == "GATE_AGREEMENT"
        assert shadow_reports(chance, 1.0, 0.96, failing=0.2) == "GATE_SHADOW_ERROR_RATE"


def test_images_that_the_preprocessing_fails_count_against_their_revision_alone() -> None:
    judge = Judge(LIMITS, 2, 1)
    judge.images.add(Tally(30, 10), Tally(380, 2))
    failed = judge.verdict()
    assert failed is not None
    assert "10 of 40 images, in the preprocess service" in failed.message
    both = Judge(LIMITS, 2, 1)
    both.images.add(Tally(30, 10), Tally(300, 100))
    assert both.verdict() is None


def test_a_judge_goes_on_from_what_was_stored() -> None:
    chance = np.random.default_rng(3)
    judge, kept = Judge(LIMITS, 2, 1), Judge(LIMITS, 2, 1)
    for _ in range(30):
        canary = tally(chance, 100, 0.004, 1, 0.5)
        base = tally(chance, 900, 0.002, 1, 0.5)
        copies = Copies(5, 9, 8, 1, 0, Latencies(4, {3: 9}))
        for each in (judge, kept):
            each.observe(canary, base)
            each.images.add(canary, base)
            each.copies.add(copies)
        assert (judge.verdict() is None) == (kept.verdict() is None)
        restored = Judge(LIMITS, 2, 1)
        restored.restore(json.loads(json.dumps(kept.to_json())))
        kept = restored
        assert kept.to_json() == judge.to_json()


def test_the_words_name_the_gate_with_the_numbers() -> None:
    judge = Judge(LIMITS, 7, 6)
    chance = np.random.default_rng(0)
    judge.observe(tally(chance, 100, 0.2, 1, 0.5), tally(chance, 1900, 0.0, 1, 0.5))
    failed = judge.verdict()
    assert failed is not None
    assert f"{judge.canary.failed} of 100 requests to revision 7 failed" in failed.message
    assert "0 of 1900 to revision 6 at the same time (0.00%)" in failed.message
    assert "the limit is 0.50%" in failed.message


def test_without_traffic_beside_it_the_limit_alone_counts() -> None:
    judge = Judge(LIMITS, 2, 1)
    judge.observe(Tally(80, 20), Tally())
    failed = judge.verdict()
    assert failed is not None
    assert failed.reason == "GATE_ERROR_RATE"


def test_a_few_failures_decide_nothing() -> None:
    judge = Judge(LIMITS, 2, 1)
    judge.observe(Tally(0, 2), Tally(10, 0))
    assert judge.verdict() is None


@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 60))
def test_the_tail_is_the_binomials(trials: int, chance: float, successes: int) -> None:
    if not trials * chance < successes <= trials:
        return
    exact = sum(
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
        for k in range(successes, trials + 1)
    )
    assert upper_tail(trials, chance, successes) == pytest.approx(exact, rel=1e-6)


@given(st.dictionaries(st.integers(-10, 200), st.integers(1, 50), max_size=20))
def test_histograms_of_different_scales_are_added_at_the_coarser(counts: dict[int, int]) -> None:
    fine = Latencies(16, dict(counts))
    coarse = Latencies(4, {3: 5})
    coarse.add(fine)
    assert coarse.scale == 4
    assert coarse.total == fine.total + 5
    other = Latencies(16, dict(counts))
    other.add(Latencies(4, {3: 5}))
    if counts:
        assert (other.scale, other.counts) == (4, coarse.counts)


def test_what_was_added_since_is_the_difference() -> None:
    now = Latencies.of(fleet_pb.Histogram(scale=16, offset=3, counts=[1, 0, 4]))
    before = Latencies.of(fleet_pb.Histogram(scale=16, offset=5, counts=[3]))
    added = now.since(before)
    assert added is not None
    assert added.counts == {3: 1, 5: 1}
    assert before.since(now) is None
