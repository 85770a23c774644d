"""Dataclasses come back from JSON with the types of their hints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray
from typing_extensions import TypeAliasType

from pollard.compress.codec import decode, encode

_Scalar = TypeVar("_Scalar", bound=np.generic)

Aliased = TypeAliasType(
    "Aliased", np.ndarray[tuple[Any, ...], np.dtype[_Scalar]], type_params=(_Scalar,)
)
"""As NumPy 2.5 defines its NDArray."""


@dataclass(frozen=True)
class Inner:
    """What another holds."""

    name: str
    parts: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    """Something of every kind."""

    matrix: NDArray[np.int64]
    aliased: Aliased[np.float32]
    inner: Inner
    several: list[Inner]
    named: dict[int, float]
    nothing: Inner | None = None
    array_or_none: NDArray[np.float32] | None = None
    path: str = field(default="")


def test_everything_comes_back_as_it_was() -> None:
    given = Outer(
        np.arange(4).reshape(2, 2),
        np.ones(2, np.float32),
        Inner("a", (1, 2)),
        [Inner("b", ())],
        {3: 0.5},
        path=str(Path("x")),
    )
    found = decode(Outer, json.loads(json.dumps(encode(given))))
    for name in ("matrix", "aliased"):
        array, wanted = getattr(found, name), getattr(given, name)
        assert isinstance(array, np.ndarray)
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)
    assert (found.inner, found.several, found.named) == (given.inner, given.several, given.named)
    assert found.nothing is None
    assert found.array_or_none is None


def test_what_is_of_another_class_is_refused() -> None:
    with pytest.raises((KeyError, TypeError)):
        decode(Inner, {"name": "a", "parts": [1], "more": 2})
