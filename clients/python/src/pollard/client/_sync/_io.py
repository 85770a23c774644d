"""What differs between the asyncio clients and the sync ones; each has its own by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import grpc

from pollard.client._images import ImageLike
from pollard.client._pool import LOCAL_SUBCHANNELS, ChannelPool
from pollard.client._upload import Upload
from pollard.models.v1 import model_service_pb2

P = ParamSpec("P")
T = TypeVar("T")

Images: TypeAlias = Iterable[ImageLike]
"""Images one after the other."""

sleep = time.sleep


def requests_of(
    images: Images, make: Callable[[ImageLike], T], failures: list[BaseException]
) -> Iterator[T]:
    """Make a request of each image; should one fail to be made, keep the error and end.

    An error in here would reach nobody: grpc only logs it.
    """
    try:
        for image in images:
            yield make(image)
    except Exception as error:
        failures.append(error)


def open_channels(
    number: int,
    address: str,
    options: list[tuple[str, Any]],
    credentials: grpc.ChannelCredentials | None,
    shown: tuple[str, str] | None = None,
) -> grpc.Channel:
    """Open a channel, or a pool of several; they connect with the first requests."""
    if number > 1:
        pool = ChannelPool(
            [
                _open(address, [*options, LOCAL_SUBCHANNELS], credentials, shown)
                for _ in range(number)
            ]
        )
        return cast("grpc.Channel", pool)  # it has all that stubs use
    return _open(address, options, credentials, shown)


def _open(
    address: str,
    options: list[tuple[str, Any]],
    credentials: grpc.ChannelCredentials | None,
    shown: tuple[str, str] | None,
) -> grpc.Channel:
    if credentials is not None:
        return grpc.secure_channel(address, credentials, options=options)
    channel = grpc.insecure_channel(address, options=options)
    return grpc.intercept_channel(channel, _Showing(shown)) if shown is not None else channel


class _Showing(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds what is shown to the metadata of every call; credentials of gRPC would want TLS."""

    def __init__(self, shown: tuple[str, str]) -> None:
        self._shown = shown

    def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = [*(details.metadata or ()), self._shown]
        return continuation(details._replace(metadata=metadata), request)

    # grpc calls all four alike.
    intercept_unary_unary: Any = _intercept
    intercept_unary_stream: Any = _intercept
    intercept_stream_unary: Any = _intercept
    intercept_stream_stream: Any = _intercept


def close_channels(opened: grpc.Channel | ChannelPool) -> None:
    """Close what `open_channels` returned, and cancel what is in flight."""
    for channel in opened.channels if isinstance(opened, ChannelPool) else (opened,):
        channel.close()


def run_blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run something that reads or hashes files."""
    return function(*args, **kwargs)


def send_upload(
    method: grpc.StreamUnaryMultiCallable[
        model_service_pb2.UploadBundleRequest, model_service_pb2.UploadBundleResponse
    ],
    upload: Upload,
    offset: int,
    timeout: float,
) -> model_service_pb2.UploadBundleResponse:
    """Make one attempt at an upload, and cancel it when nothing moves any more."""
    call = method.future(upload.requests(offset), timeout=timeout)
    try:
        while True:
            try:
                return call.result(timeout=1.0)
            except grpc.FutureTimeoutError:
                if upload.is_idle():
                    call.cancel()
            except grpc.FutureCancelledError:
                # The call itself carries the status.
                assert isinstance(call, grpc.RpcError)  # noqa: S101 - grpc's own class
                raise call from None
    except BaseException:
        call.cancel()
        raise
