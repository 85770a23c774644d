"""Dataclasses as JSON and back, by their type hints; no code is run from what is read."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def strict(value: Any) -> Any:
    """Return ``value`` with None in the place of numbers that are not finite.

    NaN is no JSON: strict readers refuse the whole file.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in value]
    return value


def encode(value: Any, skip: tuple[str, ...] = ()) -> Any:
    """Return ``value`` in terms of JSON.

    Args:
        value: Dataclasses, mappings, sequences, arrays, numbers, text.
        skip: Fields of the outermost dataclass to leave out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f.name for f in dataclasses.fields(value) if f.name not in skip)
        return {name: encode(getattr(value, name)) for name in fields}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(encode(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [encode(item) for item in value]
    return value


def decode(kind: type[T], content: Mapping[str, Any], **given: Any) -> T:
    """Return the dataclass ``kind`` from what :func:`encode` made of it.

    Args:
        kind: The dataclass.
        content: Its fields.
        given: Fields that were left out, as they are to be.

    Raises:
        KeyError, TypeError, ValueError: the content is not of that class.
    """
    hints = typing.get_type_hints(kind)
    fields = {name: _value(hints[name], item) for name, item in content.items()}
    return kind(**fields, **given)


def _value(hint: Any, item: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    # NumPy's NDArray is such an alias from 2.5 on; before, it was what it stands for.
    alias = getattr(origin, "__value__", None)
    if alias is not None:
        return _value(alias[arguments], item)
    if origin in (typing.Union, types.UnionType):
        if item is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _value(hint, item)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return decode(hint, item)
    if origin is np.ndarray:
        return np.array(item, typing.get_args(arguments[1])[0])
    if origin in (list, Sequence):
        return [_value(arguments[0], one) for one in item]
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_value(arguments[0], one) for one in item)
        return tuple(_value(one, part) for one, part in zip(arguments, item, strict=True))
    if origin in (dict, Mapping):
        key = int if arguments[0] is int else str
        return {key(name): _value(arguments[1], one) for name, one in item.items()}
    return item
