"""What the operating system says of a disk."""

from __future__ import annotations

import errno

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(error: BaseException) -> bool:
    """Tell whether an error means that a disk, a quota or the limit on a file is used up."""
    return isinstance(error, OSError) and error.errno in _NO_ROOM
