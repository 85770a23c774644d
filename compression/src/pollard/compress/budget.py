"""Budgets: what the shipped file may take, such as "latency=0.4" or "size=300kB".

Light: imported before anything heavy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pollard.compress.errors import UsageInvalid

RESOURCES = ("latency", "macs", "params", "size")

# Resource → unit → how many of the unit it is counted in: µs, operations, parameters, bytes.
_UNITS = {
    "latency": {"us": 1.0, "µs": 1.0, "ms": 1e3, "s": 1e6},
    "macs": {"k": 1e3, "M": 1e6, "G": 1e9},
    "params": {"k": 1e3, "M": 1e6, "G": 1e9},
    "size": {"B": 1.0, "kB": 1e3, "MB": 1e6, "KiB": 1024.0, "MiB": 1024.0**2},
}

# The same for people, from the smallest.
_TOLD = {
    "latency": {"µs": 1.0, "ms": 1e3, "s": 1e6},
    "macs": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "params": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "size": {"B": 1.0, "kB": 1e3, "MB": 1e6},
}


@dataclass(frozen=True)
class Budget:
    """The most that may be taken of one resource."""

    resource: str
    """One of `RESOURCES`."""
    value: float
    share: bool
    """Whether ``value`` is a share of what the parent's float file takes; otherwise it is
    in microseconds, operations, parameters or bytes."""
    text: str
    """As it was written."""

    def limit(self, parent: float) -> float:
        """Return the limit, given what the parent takes."""
        return self.value * parent if self.share else self.value


def amount(resource: str, value: float) -> str:
    """Return an amount of a resource in the unit that fits, such as "22.92 kB"."""
    fitting = [(size, unit) for unit, size in _TOLD[resource].items() if value >= size]
    size, unit = max(fitting, default=(1.0, next(iter(_TOLD[resource]))))
    return f"{value / size:.4g} {unit}".rstrip()


def parse_budgets(texts: Iterable[str]) -> list[Budget]:
    """Read budgets such as "latency=0.4", "latency=1.5ms", "macs=0.5", "params=100k", "size=0.2".

    Raises:
        UsageInvalid: one is not of that form, not positive, a share of 1 or more, or of a
            resource that is there already.
    """
    found: dict[str, Budget] = {}
    for text in texts:
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.eE+-]+)\s*([a-zA-Zµ]*)\s*", text)
        name = match[1] if match else ""
        if match is None or name not in RESOURCES:
            raise UsageInvalid(
                f"budget {text!r} is not RESOURCE=AMOUNT with one of {', '.join(RESOURCES)}, such "
                "as latency=0.4 (of the parent's float file) or latency=1.5ms"
            )
        if name in found:
            raise UsageInvalid(f"there are two budgets for {name}: {found[name].text} and {text}")
        units = _UNITS[name]
        if match[3] and match[3] not in units:
            raise UsageInvalid(
                f"budget {text!r}: the unit {match[3]!r} is not one of {', '.join(units)}"
            )
        try:
            value = float(match[2]) * units.get(match[3], 1.0)
        except ValueError:
            value = math.nan
        share = not match[3]
        if not (value > 0 and math.isfinite(value) and (value < 1 or not share)):
            wanted = "a share between 0 and 1, or an amount with a unit" if share else "positive"
            raise UsageInvalid(f"budget {text!r}: {match[2]} must be {wanted}")
        found[name] = Budget(name, value, share, text.strip())
    return list(found.values())
