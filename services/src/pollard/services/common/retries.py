"""What a server could not fetch or load: for which reasons that is tried again, and when."""

from __future__ import annotations

import random
import re

from google.rpc import error_details_pb2, status_pb2

from pollard.services.common.errors import DataLoss, ServiceError, out_of_threads

_FIRST_SECONDS = 2.0
_LAST_SECONDS = 60.0

_PASSING = frozenset({"BUNDLE_UNAVAILABLE", "BUNDLE_UNKNOWN", "CACHE_FAULT", "DISK_FULL"})


def may_pass(error: BaseException) -> bool:
    """Tell whether trying again may help, with the same order and the same settings.

    What is wrong with a bundle, and what does not fit into this machine, stays so.
    """
    if isinstance(error, ServiceError):
        return error.reason in _PASSING or (
            isinstance(error, DataLoss) and error.reason == "BUNDLE_CORRUPT"
        )
    return isinstance(error, OSError) or out_of_threads(error)


class Pauses:
    """Pauses that double from 2 s to 60 s, none quite like that of another server."""

    def __init__(self) -> None:
        self._next = _FIRST_SECONDS

    def begin_anew(self) -> None:
        """Begin with the shortest again."""
        self._next = _FIRST_SECONDS

    def take(self) -> float:
        """Return the next pause in seconds."""
        pause = self._next * random.uniform(0.8, 1.2)
        self._next = min(2 * self._next, _LAST_SECONDS)
        return pause


_PROMISE = re.compile(r"; it is tried again in \d+ s")


def promised(message: str, seconds: float) -> str:
    """Return what is said of something that is tried again."""
    return f"{message.rstrip('.')}; it is tried again in {seconds:.0f} s"


def promise(status: status_pb2.Status, seconds: float) -> None:
    """Say in a status that what failed is tried again."""
    status.message = promised(status.message, seconds)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(round(seconds * 1000))
    status.details.add().Pack(retry)


def given_up(status: status_pb2.Status) -> status_pb2.Status:
    """Return a status that does not say that something is tried again, because it no longer is."""
    kept = status_pb2.Status(code=status.code, message=_PROMISE.sub("", status.message))
    kept.details.extend(
        each for each in status.details if not each.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    )
    return kept


def is_promised(status: status_pb2.Status) -> bool:
    """Tell whether a status says that what failed is tried again."""
    return _PROMISE.search(status.message) is not None
