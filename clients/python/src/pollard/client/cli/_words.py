"""Plain words to people: what every command needs, and cheap to import."""

from __future__ import annotations

import re
import sys


def printable(text: str) -> str:
    """Return a text with what would steer a terminal written out, such as `\\x1b`.

    Notes, labels and messages come from others. Ends of lines and tabs stay; so do letters of every
    script, but not the marks that turn the direction of what follows.
    """
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def fail(message: str) -> None:
    """Write an error to standard error as plain text, whatever it contains."""
    print(f"error: {printable(message)}", file=sys.stderr)


def warn(message: str) -> None:
    """Write a warning to standard error as plain text."""
    print(f"warning: {printable(message)}", file=sys.stderr)
