"""The process's memory: what is freed goes back, and what stays is left out of collections."""

from __future__ import annotations

import ctypes
import gc

_YOUNG_OBJECTS = 10_000
"""Python's 700 starts a collection every few requests, almost always for nothing."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""

_MAPPED_BYTES = 1 << 20
_KEPT_BYTES = 64 << 20


def steady_heap() -> None:
    """Keep what is large, the weights of models, out of the heap; to be called before any is there.

    glibc puts into its heap whatever is as large as something that was freed before. There a small
    piece that stays behind a large one keeps all of it: with every few swaps the process would hold
    one model more that nobody has.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
    # It goes with the other, and would give back the room of every request at its end.
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def freeze_heap() -> None:
    """Leave what is there now, modules above all, out of all further garbage collections.

    To be called once, when the server is about to take requests: a full collection would look at
    everything that was imported, in the middle of a request.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 50)


def return_memory() -> None:
    """Give freed memory back to the operating system; glibc keeps much of it otherwise."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        # Another C library; it decides for itself.
        return
