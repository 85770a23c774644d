from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from pollard.bundle.v1 import bundle_pb2
from pollard.compress import metrics
from pollard.runtime.postprocess import activate

CLASSES = [f"class {i}" for i in range(7)]


def _answers(seed: int, samples: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right more often than not, and the truth; some classes are rare."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(7, samples, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.04, 0.01])
    logits = generator.normal(0, 1.5, (samples, 7))
    logits[np.arange(samples), labels] += 1.5
    return activate(logits, bundle_pb2.ACTIVATION_SOFTMAX), labels


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_figures_are_those_of_scikit_learn(seed: int) -> None:
    scores, labels = _answers(seed)
    best = metrics.predictions(scores)
    every = list(range(7))
    assert metrics.top_k(scores, labels, 1).value == reference.accuracy_score(labels, best)
    assert metrics.top_k(scores, labels, 5).value == pytest.approx(
        reference.top_k_accuracy_score(labels, scores, k=5, labels=every), abs=1e-12
    )
    assert (
        metrics.confusion(best, labels, 7) == reference.confusion_matrix(labels, best, labels=every)
    ).all()
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, best, labels=every, zero_division=0
    )
    found = metrics.by_class(best, labels, CLASSES)
    assert [one.precision for one in found] == pytest.approx(precision, abs=1e-12)
    assert [one.recall for one in found] == pytest.approx(recall, abs=1e-12)
    assert [one.f1 for one in found] == pytest.approx(f1, abs=1e-12)
    assert [one.support for one in found] == support.tolist()
    assert metrics.log_loss(scores, labels) == pytest.approx(
        reference.log_loss(labels, scores, labels=every), rel=1e-9
    )


def test_the_interval_of_macro_f1_holds_it() -> None:
    scores, labels = _answers(1)
    best = metrics.predictions(scores)
    lower, upper = metrics.macro_f1_interval(best, labels, 7)
    assert lower < reference.f1_score(labels, best, average="macro") < upper
    assert metrics.macro_f1_interval(best, labels, 7) == (lower, upper)


def test_calibration_is_the_gap_between_said_and_right() -> None:
    scores = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = np.array([0] * 8 + [1] * 2 + [1] * 6 + [0] * 4)
    found = metrics.calibration(scores, labels)
    # 0.9 said and 0.8 right; 0.6 said and 0.6 right.
    assert found.error == pytest.approx(0.05)
    assert sum(one.samples for one in found.bins) == 20


def test_the_edges_of_the_bins_belong_to_the_lower_one() -> None:
    found = metrics.calibration(np.array([[1.0, 0.0], [0.2, 0.2]]), np.array([0, 0]))
    assert [one.samples for one in found.bins if one.samples] == [1, 1]
    assert found.bins[2].samples == 1
    assert found.bins[-1].samples == 1


def test_answers_that_are_no_numbers_are_wrong_and_in_no_column() -> None:
    scores = np.array([[0.7, 0.3], [np.nan, 0.2], [0.1, 0.9]])
    labels = np.array([0, 1, 1])
    best = metrics.predictions(scores)
    assert best.tolist() == [0, -1, 1]
    assert metrics.top_k(scores, labels, 2).value == pytest.approx(2 / 3)
    assert metrics.confusion(best, labels, 2).tolist() == [[1, 0], [0, 1]]
    assert metrics.by_class(best, labels, ["a", "b"])[1].recall == 0.5
    assert metrics.calibration(scores, labels).error == pytest.approx(0.2)


def test_of_equal_scores_the_first_class_is_the_better() -> None:
    scores = np.array([[0.5, 0.5], [0.5, 0.5]])
    assert metrics.predictions(scores).tolist() == [0, 0]
    assert metrics.top_k(scores, np.array([0, 1]), 1).value == 0.5


def test_agreement_counts_answers_and_not_luck() -> None:
    labels = np.array([0, 0, 1, 1])
    found = metrics.agreement(np.array([0, 1, 1, 1]), np.array([0, 1, 0, -1]), labels)
    assert found["same_answer"]["value"] == 0.5
    assert (found["only_first_right"], found["only_second_right"]) == (2, 0)
    assert found["difference_points"]["estimate"] == pytest.approx(50)
    assert found["difference_points"]["lower"] < 50 < found["difference_points"]["upper"]
