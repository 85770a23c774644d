"""Texts that people see, without the secrets that settings may hold."""

from __future__ import annotations

import re

_IN_QUERY = re.compile(
    r"([?&][^=&]*(?:password|passwd|secret|token|key|signature|sig|credential)[^=&]*=)[^&\s]*",
    re.IGNORECASE,
)

HIDDEN = "***"


def without_secrets(text: str) -> str:
    """Return a text without the passwords of the URL that it may be.

    What stands before the last "@" goes as a whole: a password that was not escaped may hold any
    character that ends a part of a URL.
    """
    scheme, colon, rest = text.partition("://")
    if not colon:
        return text
    _, at, place = rest.rpartition("@")
    shown = f"{scheme}://{HIDDEN}@{place}" if at else text
    return _IN_QUERY.sub(rf"\g<1>{HIDDEN}", shown)
