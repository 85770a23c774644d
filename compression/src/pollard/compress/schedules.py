"""How the learning rate goes: its share of the peak at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["one-cycle", "cosine", "step", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("one-cycle", "cosine", "step", "constant")


def one_cycle(total: int) -> Callable[[int], float]:
    """Return the share of the peak learning rate at each of ``total`` steps.

    It rises for a fifth of the time and falls to nothing, both along a cosine (Smith and
    Topin, 2017).
    """
    rise = max(1, round(0.2 * total))

    def share(step: int) -> float:
        if step < rise:
            return 0.04 + 0.96 * (1 - math.cos(math.pi * step / rise)) / 2
        return max(1e-4, (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2)

    return share


def cosine(total: int) -> Callable[[int], float]:
    """Fall from the start to nothing along half a cosine (Loshchilov and Hutter, 2017)."""
    return lambda step: max(1e-4, (1 + math.cos(math.pi * step / max(1, total))) / 2)


def stepped(total: int) -> Callable[[int], float]:
    """Fall to a tenth after half of the steps, and again after three quarters."""
    return lambda step: 0.1 ** ((step >= total / 2) + (step >= 0.75 * total))


def schedule(name: Schedule, total: int) -> Callable[[int], float]:
    """Return the schedule called ``name`` for ``total`` steps."""
    if name == "constant":
        return lambda _: 1.0
    return {"one-cycle": one_cycle, "cosine": cosine, "step": stepped}[name](total)
