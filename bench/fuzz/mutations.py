"""Damage without any guidance: what a short run makes do with."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF)


def damaged(seeds: Sequence[bytes], random_: random.Random) -> bytes:
    """Return one of the seeds with one to five things changed."""
    data = bytearray(random_.choice(seeds))
    for _ in range(random_.randint(1, 5)):
        place = random_.randrange(len(data) + 1)
        span = random_.choice((1, 2, 4, 8, 64, len(data) // 4 + 1))
        change = random_.randrange(7)
        if change == 0:
            del data[place:]
        elif change == 1:
            del data[place : place + span]
        elif change == 2:
            data[place : place + span] = random_.randbytes(span)
        elif change == 3:
            data[place:place] = data[place : place + span] * random_.choice((1, 2, 50))
        elif change == 4:
            number = random_.choice(_NUMBERS)
            size = random_.choice((1, 2, 4, 8))
            order = random_.choice(("big", "little"))
            written = (number % (1 << 8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
            data[place : place + size] = written
        elif change == 5 and place < len(data):
            data[place] ^= 1 << random_.randrange(8)
        else:
            other = random_.choice(seeds)
            begin = random_.randrange(len(other) + 1)
            data[place : place + span] = other[begin : begin + span]
    return bytes(data[:65536])
