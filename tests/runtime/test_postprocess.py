"""Outputs become labels and scores, the same ones every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import ManifestInvalid, TensorInvalid
from pollard.runtime.postprocess import classify, classify_batch, embed_views


def manifest(activation=bundle_pb2.ACTIVATION_SOFTMAX, top_k=0) -> bundle_pb2.Manifest:
    return bundle_pb2.Manifest(
        task=bundle_pb2.TASK_CLASSIFICATION,
        outputs=[bundle_pb2.TensorSpec(name="logits")],
        postprocess=bundle_pb2.Postprocess(
            classification=bundle_pb2.Classification(
                output="logits", activation=activation, default_top_k=top_k
            )
        ),
    )


def logits(*rows):
    return {"logits": np.array(rows, np.float32)}


def test_softmax_by_falling_score_with_labels():
    best = classify(logits([0.0, 2.0, 1.0]), manifest(), ["a", "b", "c"], top_k=2)
    assert [(b.class_index, b.label) for b in best] == [(1, "b"), (2, "c")]
    exponentials = np.exp([0.0, 2.0, 1.0])
    assert best[0].score == pytest.approx(exponentials[1] / exponentials.sum())


def test_top_k_from_the_request_then_the_manifest_then_five():
    row = list(range(20))
    assert len(classify(logits(row), manifest(top_k=3), top_k=7)) == 7
    assert len(classify(logits(row), manifest(top_k=3))) == 3
    assert len(classify(logits(row), manifest())) == 5
    assert len(classify(logits(row), manifest(), top_k=100)) == 20


def test_missing_labels_are_empty():
    assert [b.label for b in classify(logits([3.0, 2.0, 1.0]), manifest(), ["a"])] == ["a", "", ""]


def test_equal_outputs_are_ordered_by_index():
    best = classify(logits([1.0, 5.0, 5.0, 5.0]), manifest(), top_k=3)
    assert [b.class_index for b in best] == [1, 2, 3]


def test_outputs_that_only_rounding_makes_equal_keep_their_order():
    best = classify(logits([1000.0, 2000.0]), manifest(bundle_pb2.ACTIVATION_SIGMOID))
    assert [b.class_index for b in best] == [1, 0]
    assert best[0].score == best[1].score == 1.0


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_scores_are_finite_and_softmax_sums_to_one(row):
    best = classify(logits(row), manifest(), top_k=len(row))
    assert sum(b.score for b in best) == pytest.approx(1)
    for b in classify(logits(row), manifest(bundle_pb2.ACTIVATION_SIGMOID), top_k=len(row)):
        assert 0 <= b.score <= 1


def test_no_activation_gives_the_outputs():
    best = classify(logits([0.25, 0.5]), manifest(bundle_pb2.ACTIVATION_NONE))
    assert [b.score for b in best] == [0.5, 0.25]


def test_a_batch_is_answered_image_by_image():
    answers = classify_batch(logits([0.0, 1.0], [1.0, 0.0]), manifest(), top_k=1)
    assert [a[0].class_index for a in answers] == [1, 0]
    with pytest.raises(TensorInvalid, match="2 images"):
        classify(logits([0.0, 1.0], [1.0, 0.0]), manifest())


def test_a_pooled_head_may_leave_ones():
    output = {"logits": np.zeros((1, 4, 1, 1), np.float32)}
    assert len(classify(output, manifest(), top_k=4)) == 4


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"other": np.zeros((1, 3), np.float32)}, "no output 'logits'; it gave other"),
        ({"logits": np.zeros((1, 3, 7, 7), np.float32)}, "shape"),
        ({"logits": np.zeros(3, np.float32)}, "shape"),
        ({"logits": np.array([[1.0, np.nan]], np.float32)}, "not finite"),
    ],
)
def test_outputs_that_are_no_classification(outputs, words):
    with pytest.raises(TensorInvalid, match=words):
        classify(outputs, manifest())


def test_a_manifest_of_another_task():
    with pytest.raises(ManifestInvalid):
        classify(logits([1.0]), bundle_pb2.Manifest())


def embedding(l2_normalize: bool = False) -> bundle_pb2.Manifest:
    return bundle_pb2.Manifest(
        task=bundle_pb2.TASK_EMBEDDING,
        outputs=[bundle_pb2.TensorSpec(name="vector")],
        postprocess=bundle_pb2.Postprocess(
            embedding=bundle_pb2.Embedding(output="vector", l2_normalize=l2_normalize)
        ),
    )


def test_an_embedding_is_the_mean_over_the_views():
    vectors = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    assert embed_views({"vector": vectors}, embedding()).tolist() == [2.0, 4.0]


def test_an_embedding_is_scaled_to_unit_length_where_the_manifest_says_so():
    given = {"vector": np.array([[3.0, 4.0]], np.float32)}
    assert embed_views(given, embedding(True)).tolist() == pytest.approx([0.6, 0.8])
    nothing = {"vector": np.zeros((1, 3), np.float32)}
    assert embed_views(nothing, embedding(True)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("vector", [np.zeros((2, 3, 4)), np.zeros((1, 0)), [[np.nan]], [1.0]])
def test_no_embedding_out_of_other_outputs(vector):
    with pytest.raises(TensorInvalid, match="vector"):
        embed_views({"vector": np.array(vector, np.float32)}, embedding())
    with pytest.raises(ManifestInvalid, match="embedding"):
        embed_views({"vector": np.zeros((1, 2))}, manifest())


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    st.integers(1, 70),
)
def test_the_best_are_those_of_a_whole_sort_whatever_is_equal(row, top_k):
    best = classify(logits(row), manifest(bundle_pb2.ACTIVATION_NONE), top_k=top_k)
    expected = sorted(range(len(row)), key=lambda index: (-row[index], index))[:top_k]
    assert [each.class_index for each in best] == expected
    assert [each.score for each in best] == [row[index] for index in expected]
