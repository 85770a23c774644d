"""What an examination finds."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.StrEnum):
    """How bad it is."""

    GOOD = "good"
    NOTE = "note"
    """Something is slower or not offered; everything else works."""
    BAD = "bad"
    """Pollard, or what was asked for, does not run."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: State
    found: str
    cure: str = ""
    """What to do; empty if nothing."""

    def as_dict(self) -> dict[str, str]:
        """Return it for JSON."""
        return {
            "subject": self.subject,
            "state": self.state.value,
            "found": self.found,
            "cure": self.cure,
        }


def good(subject: str, found: str) -> Finding:
    """Return a finding of nothing to do."""
    return Finding(subject, State.GOOD, found)


def note(subject: str, found: str, cure: str = "") -> Finding:
    """Return a finding that can be lived with."""
    return Finding(subject, State.NOTE, found, cure)


def bad(subject: str, found: str, cure: str) -> Finding:
    """Return a finding that must be mended."""
    return Finding(subject, State.BAD, found, cure)
