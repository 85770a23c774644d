"""How many inference servers are enough, as people and programs write it."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TypeAlias

from pollard.models.v1 import model_service_pb2

Quorum: TypeAlias = int | float | Fraction | str
"""A number of servers (2 or "2"), or a share of them (0.5, Fraction(2, 3), "2/3" or "67%")."""

_FRACTION = re.compile(r"\s*([0-9]{1,6})\s*/\s*([0-9]{1,6})\s*")
_PERCENT = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]+)?)\s*%\s*")
_COUNT = re.compile(r"\s*([0-9]{1,6})\s*")


def quorum_of(value: Quorum | None) -> model_service_pb2.Quorum | None:
    """Return a quorum as messages carry it; None for all servers.

    Raises:
        ValueError: It is neither a number of servers, 1 or more, nor a share above 0, up to 1.
    """
    if value is None:
        return None
    read = _read(value) if isinstance(value, str) else value
    if isinstance(read, bool) or read is None:
        raise _wrong(value)
    if isinstance(read, int):
        if not 1 <= read <= 100_000:
            raise _wrong(value)
        return model_service_pb2.Quorum(servers=read)
    if not (math.isfinite(read) and 0 < read <= 1):
        raise _wrong(value)
    return model_service_pb2.Quorum(share=float(read))


def _read(text: str) -> int | Fraction | None:
    if found := _FRACTION.fullmatch(text):
        whole = int(found[2])
        return Fraction(int(found[1]), whole) if whole else None
    if found := _PERCENT.fullmatch(text):
        return Fraction(found[1]) / 100
    if found := _COUNT.fullmatch(text):
        return int(found[1])
    return None


def _wrong(value: Quorum) -> ValueError:
    return ValueError(
        f"{value!r} is no quorum; write a number of servers such as 2, or a share of them such as "
        "2/3 or 67%"
    )
