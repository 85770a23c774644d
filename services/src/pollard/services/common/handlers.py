"""What grpcio's server calls for a method, made anew around another function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

_MAKERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""By whether requests, and answers, are a stream."""


def function_of(handler: Any) -> Callable[..., Any]:
    """Return the function that answers calls of a handler."""
    found: Callable[..., Any] = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    return found


def with_function(
    handler: Any,
    function: Callable[..., Any],
    parse: Callable[[bytes], Any] | None = None,
) -> Any:
    """Return a handler for the same messages that `function` answers.

    Args:
        handler: For which messages.
        function: Answers them.
        parse: Reads the messages of requests; None for what reads the handler's.
    """
    return _MAKERS[handler.request_streaming, handler.response_streaming](
        function,
        request_deserializer=parse or handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


class WrappedHandlers:
    """Handlers that an interceptor has made anew around its server's, one for each method."""

    def __init__(self) -> None:
        """Begin with none."""
        self._kept: dict[str, tuple[Any, Any]] = {}

    def of(self, method: str, handler: Any, wrap: Callable[[], Any]) -> Any:
        """Return what `wrap` makes of a method's handler, or has made of it before."""
        kept = self._kept.get(method)
        # The handler of a method is made once; another one means that the server was changed.
        if kept is None or kept[0] is not handler:
            kept = self._kept[method] = (handler, wrap())
        return kept[1]
