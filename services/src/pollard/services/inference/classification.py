"""The classification extension: the best classes of an output in place of all its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pollard.runtime.sessions import Array
from pollard.services.inference.errors import RequestInvalid


def top_classes(
    scores: Array, datatype: str, count: int, labels: Sequence[str], *, batched: bool, output: str
) -> Array:
    """Return the best classes, best first, as texts "score:index" or "score:index:label".

    Args:
        scores: The output.
        datatype: Its type in the protocol.
        count: How many classes are wanted; as many as there are if that is fewer.
        labels: Names of the classes; those beyond its end have none.
        batched: Whether the first dimension is a batch; then each of its rows is ranked by itself.
        output: Name of the output, for messages.

    Returns:
        Objects of bytes, of shape [batch, classes] or [classes].

    Raises:
        RequestInvalid: the output does not hold numbers.
    """
    if datatype in ("BYTES", "BOOL"):
        raise RequestInvalid(
            f"class result not available for output '{output}' due to unsupported type "
            f"'{datatype}'",
            output=output,
        )
    values = scores
    if datatype == "BF16":
        values = (scores.astype(np.uint32) << 16).view(np.float32)
    rows = scores.shape[0] if batched else 1
    # Not -1: numpy cannot tell the width of no rows.
    table = values.reshape(rows, math.prod(scores.shape) // rows if rows else 0)
    count = min(count, table.shape[1])
    # Negated, so that equal scores keep their order; in float, so that no integer overflows.
    best = np.argsort(-table.astype(np.float64), axis=1, kind="stable")[:, :count]
    result = np.empty((rows, count), dtype=np.object_)
    for row in range(rows):
        for place, index in enumerate(best[row]):
            result[row, place] = _text(table[row, index], int(index), labels)
    return result if batched else result[0]


def _text(score: np.generic, index: int, labels: Sequence[str]) -> bytes:
    value = score.item()
    text = f"{value:f}" if isinstance(value, float) else str(value)
    if index < len(labels):
        return f"{text}:{index}:{labels[index]}".encode()
    return f"{text}:{index}".encode()
