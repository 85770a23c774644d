"""What a section is told, and how it keeps what it finds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTED = "POLLARD_BENCH_STARTED"
"""Environment variable: when the whole run began, on the clock of `time.monotonic`."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    image_model: str = "resnet50"
    """Network of the zoo that is measured."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    few: tuple[int, ...] = (1, 8, 32)
    """Batches at which options are compared."""
    request_batch: int = 32
    """Rows of a large request to the service."""
    seconds: float = 0.25
    """Of one measurement in this process."""
    load_seconds: float = 3.0
    """Of one measurement of the service."""
    callers: int = 8
    """Processes that make load."""
    in_flight: int = 32
    """Requests of one image that each of them has under way."""
    replicas: tuple[int, ...] = (1, 2, 4)
    swap_seconds: float = 6.0
    """Of each part of a round, steady or swapping."""
    swaps: int = 50
    """Of the measurement of memory."""
    rounds: int = 3
    """Of interleaved comparisons."""


FULL = Sizes()

TINY = Sizes(
    image_model="resnet20-cifar",
    batches=(1, 2, 4),
    few=(1, 4),
    request_batch=4,
    seconds=0.03,
    load_seconds=0.7,
    callers=2,
    in_flight=4,
    replicas=(1, 2),
    swap_seconds=1.5,
    swaps=4,
    rounds=2,
)
"""Enough to see that everything runs, in a minute on two cores."""


@dataclass
class Setup:
    """What a section is told."""

    provider: str
    """"cuda", or "cpu" where only the benchmark itself is tried."""
    tiny: bool
    models: Path
    """Folder of the models that were made."""
    work: Path
    """Folder for what the section writes beside its results."""
    result: Path
    """File of its results."""
    seconds: float
    """How long it may take."""
    only_zoo: tuple[str, ...] = ()
    """Networks to make and compare; all of the zoo when empty."""
    with_zoo: bool = True
    """Whether the zoo is made, too."""
    data: dict[str, Any] = field(default_factory=dict)
    """Its results so far."""

    def __post_init__(self) -> None:
        self.until = time.monotonic() + self.seconds

    @property
    def sizes(self) -> Sizes:
        """How much is measured."""
        return TINY if self.tiny else FULL

    @property
    def left(self) -> float:
        """Seconds that it still has."""
        return self.until - time.monotonic()

    def keep(self, name: str, value: Any) -> None:
        """Keep a result, on disk too: what was found before a run is killed is not lost."""
        self.data[name] = value
        partial = self.result.with_suffix(".part")
        partial.write_text(json.dumps(self.data, indent=1))
        partial.replace(self.result)

    def write(self, path: Path) -> None:
        """Write it, for the process of a section to read."""
        content = {key: value for key, value in asdict(self).items() if key != "data"}
        path.write_text(json.dumps(content, default=str))

    @classmethod
    def read(cls, path: Path) -> Setup:
        """Read what `write` wrote; its time begins now."""
        content = json.loads(path.read_text())
        for name in ("models", "work", "result"):
            content[name] = Path(content[name])
        content["only_zoo"] = tuple(content["only_zoo"])
        return cls(**content)


@dataclass(frozen=True)
class Table:
    """What is printed of a section."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""

    def __str__(self) -> str:
        cells = [[str(cell) for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            + " |"
            for row in cells
        ]  # fmt: skip
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def say(text: str) -> None:
    """Print progress, with the seconds since the whole run began."""
    since = time.monotonic() - float(os.environ.get(STARTED, time.monotonic()))
    print(f"[{since:6.1f} s] {text}", flush=True)


def ratio(ours: float | None, theirs: float | None) -> str:
    """Return ours over theirs for a table; a dash where one of them was not measured."""
    return f"{ours / theirs:.2f} ×" if ours and theirs else "–"
