"""Where training stands, on disk: what a killed run goes on from, to the step.

A checkpoint holds tensors, numbers and text only, and is read without running any code
that might be in the file. Whoever writes it says what it belongs to; a file that belongs
to something else, or is damaged, counts as absent.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pollard.compress.errors import WeightsInvalid
from pollard.runtime.bundle import write_durably

SCHEMA_VERSION = 1


def checkpoint_beside(out: Path) -> Path:
    """Return where the training that is to write ``out`` notes how far it is."""
    return out.with_name(f"{out.stem}.checkpoint.pt")


@dataclass
class Checkpoint:
    """A file that is replaced every now and then, whole or not at all."""

    path: Path
    belongs_to: str = ""
    """Key of the work; a file with another key is not used."""
    every_seconds: float = 30.0
    """At least so long between two saves."""
    share: float = 0.02
    """Of the time, no more is spent on saving."""
    _next: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        self._next = time.monotonic() + self.every_seconds

    def load(self) -> dict[str, Any] | None:
        """Return what was saved last, or None if there is nothing to go on from."""
        held = self.read()
        if held is None:
            return None
        try:
            content = _parse(held)
        except Exception:  # torch.load raises whatever unpickling raises
            return None
        if (
            not isinstance(content, dict)
            or content.get("schema_version") != SCHEMA_VERSION
            or content.get("belongs_to") != self.belongs_to
        ):
            return None
        state: dict[str, Any] = content["state"]
        return state

    def owner(self) -> str:
        """Return the key of the work that the file belongs to; empty when there is none.

        Raises:
            WeightsInvalid: the file is damaged, or none of this version's.
        """
        held = self.read()
        if held is None:
            return ""
        try:
            content = _parse(held)
            if content["schema_version"] == SCHEMA_VERSION:
                return str(content["belongs_to"])
        except Exception as error:  # torch.load raises whatever unpickling raises
            raise WeightsInvalid(
                f"the checkpoint {self.path} is damaged; give --force instead of --resume to begin "
                "anew"
            ) from error
        raise WeightsInvalid(
            f"the checkpoint {self.path} is of another version of Pollard; go on with that one, or "
            "give --force instead of --resume to begin anew"
        )

    def read(self) -> bytes | None:
        """Return what the file holds, or None if it is not there."""
        try:
            return self.path.read_bytes()
        except OSError:
            return None

    def write(self, content: bytes) -> None:
        """Replace what the file holds.

        Raises:
            OSError: it cannot be written; what it held before is still there.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.path, content)

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() >= self._next

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written; what was saved before is still there.
        """
        started = time.monotonic()
        buffer = io.BytesIO()
        torch.save(
            {"schema_version": SCHEMA_VERSION, "belongs_to": self.belongs_to, "state": state},
            buffer,
        )
        self.write(buffer.getvalue())
        ended = time.monotonic()
        self._next = ended + max(self.every_seconds, (ended - started) / self.share)

    def remove(self) -> None:
        """Forget what was saved."""
        self.path.unlink(missing_ok=True)


def _parse(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
