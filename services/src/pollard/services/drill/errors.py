"""What keeps a drill from being carried out."""

from __future__ import annotations


class DrillFailed(Exception):
    """The drill cannot begin, or cannot go on; says why, and what to do."""
