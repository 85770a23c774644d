"""Where a request goes that names no revision: one function for the vision and
the inference service, so that both choose alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

PRODUCTION = "production"
"""Alias of requests that name neither a revision nor an alias."""

ALIAS_METADATA = "pollard-alias"
"""gRPC metadata key that carries an alias in the inference protocol."""

STICKY_METADATA = "pollard-sticky-key"
"""gRPC metadata key that carries a sticky key in the inference protocol."""


def choose_revision(targets: Sequence[tuple[int, int]], sticky_key: str = "") -> int | None:
    """Choose one revision in proportion to the weights.

    Args:
        targets: Pairs of revision and weight.
        sticky_key: Requests with the same key get the same revision while the
            targets do not change, on every server; empty draws anew.

    Returns:
        The revision, or None when no target has a weight.
    """
    if len(targets) == 1:
        return targets[0][0] if targets[0][1] > 0 else None
    total = sum(weight for _, weight in targets)
    if total <= 0:
        return None
    if sticky_key:
        digest = hashlib.blake2b(sticky_key.encode(), digest_size=8).digest()
        point = int.from_bytes(digest, "big") * total >> 64
    else:
        point = random.randrange(total)
    # In the order of the revisions, so that the order of the message is no matter.
    for revision, weight in sorted(targets):
        if point < weight:
            return revision
        point -= weight
    return None
