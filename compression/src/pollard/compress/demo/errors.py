"""Why the demo could not be finished."""

from __future__ import annotations


class DemoFailed(Exception):
    """A step of the demo failed; the message says which and why."""
