"""Request ids: what a call is called in logs, traces and answers."""

from __future__ import annotations

import random
import re

REQUEST_ID = "x-request-id"
"""Metadata key, and HTTP header, in which a caller may name its call, and is told the name."""

_FORM = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

_random_bits = random.SystemRandom().getrandbits
_quick_bits = random.Random(_random_bits(128)).getrandbits


def request_id_of(given: str | bytes) -> str:
    """Return what a call is called: what its caller says, or something new.

    Args:
        given: The header as it came; empty if there is none. What is long, or could break a line
            of a log or a header, is not taken.
    """
    if given:
        text = given if isinstance(given, str) else given.decode("latin-1")
        if _FORM.fullmatch(text):
            return text
    return f"{_quick_bits(64):016x}"
