"""Several channels that look like one: each call takes the next.

One HTTP/2 connection is read by one thread of a server, and one process behind a shared port has
all of a connection's calls. Who sends much opens several.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

LOCAL_SUBCHANNELS = ("grpc.use_local_subchannel_pool", 1)
"""Without this option gRPC joins channels to the same address on one connection."""


class ChannelPool:
    """What the generated stubs use of a channel, spread over several.

    Args:
        channels: All `grpc.Channel` or all `grpc.aio.Channel`, with `LOCAL_SUBCHANNELS`.
    """

    def __init__(self, channels: Sequence[Any]) -> None:
        self.channels = tuple(channels)

    def unary_unary(self, *args: Any, **kwargs: Any) -> _Turns:
        """Return a callable of a method."""
        return _Turns([channel.unary_unary(*args, **kwargs) for channel in self.channels])

    def unary_stream(self, *args: Any, **kwargs: Any) -> _Turns:
        """Return a callable of a method."""
        return _Turns([channel.unary_stream(*args, **kwargs) for channel in self.channels])

    def stream_unary(self, *args: Any, **kwargs: Any) -> _Turns:
        """Return a callable of a method."""
        return _Turns([channel.stream_unary(*args, **kwargs) for channel in self.channels])

    def stream_stream(self, *args: Any, **kwargs: Any) -> _Turns:
        """Return a callable of a method."""
        return _Turns([channel.stream_stream(*args, **kwargs) for channel in self.channels])


class _Turns:
    """A method's callables, one for each channel, taken in turn. Threads may share it."""

    def __init__(self, callables: Sequence[Callable[..., Any]]) -> None:
        # `next` of a cycle is one step of the interpreter, so no two threads get in its way.
        self._next = itertools.cycle(callables).__next__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._next()(*args, **kwargs)

    def future(self, *args: Any, **kwargs: Any) -> Any:
        callable_: Any = self._next()
        return callable_.future(*args, **kwargs)
