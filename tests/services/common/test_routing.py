from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pollard.services.common.routing import choose_revision


def test_one_target_is_always_chosen():
    assert choose_revision([(7, 1)]) == 7
    assert choose_revision([(7, 100)], "somebody") == 7


def test_nothing_to_choose_from():
    assert choose_revision([]) is None
    assert choose_revision([(1, 0)]) is None
    assert choose_revision([(1, 0), (2, 0)], "k") is None


def test_weights_are_shares():
    counts = Counter(choose_revision([(1, 95), (2, 5)], str(key)) for key in range(20_000))
    assert 0.04 < counts[2] / 20_000 < 0.06


targets = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 100)),
    min_size=1,
    max_size=5,
    unique_by=lambda t: t[0],
)


@given(targets, st.text(min_size=1))
def test_a_sticky_key_gets_the_same_revision_whatever_the_order(pairs, key):
    chosen = choose_revision(pairs, key)
    assert choose_revision(list(reversed(pairs)), key) == chosen
    weights = dict(pairs)
    assert (chosen is None) == (sum(weights.values()) == 0)
    if chosen is not None:
        assert weights[chosen] > 0


def test_growing_a_canary_moves_keys_only_towards_it():
    keys = [str(key) for key in range(2000)]
    at_five = {key for key in keys if choose_revision([(1, 95), (2, 5)], key) == 2}
    at_fifty = {key for key in keys if choose_revision([(1, 50), (2, 50)], key) == 2}
    assert at_five <= at_fifty
