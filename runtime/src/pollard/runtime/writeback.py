"""Bringing large files to the disk while they are still being written."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def begin_writeback(descriptor: int, offset: int, size: int) -> None:
    """Let the disk begin with what was written, so that the fsync has little left to do.

    Args:
        descriptor: Of the file.
        offset: Where the bytes begin.
        size: How many there are.
    """
    write = _sync_file_range()
    if write is not None:
        sync_file_range_write = 2
        # What it cannot do, the fsync does.
        write(descriptor, offset, size, sync_file_range_write)


@cache
def _sync_file_range() -> Any:
    """Return the function of the C library; None where there is none."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
