"""The process's memory: what is freed goes back, and what stays is left out of collections."""

from __future__ import annotations

import ctypes
import gc

_YOUNG_OBJECTS = 10_000
"""Python's 700 starts a collection every few requests, almost always for nothing."""


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
