from __future__ import annotations

import pytest

import pollard.compress


def test_every_public_name_is_there() -> None:
    assert len(pollard.compress.__all__) == 18
    for name in pollard.compress.__all__:
        assert getattr(pollard.compress, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune_all'"):
        _ = pollard.compress.prune_all
