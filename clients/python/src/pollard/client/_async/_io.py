"""What differs between the asyncio clients and the sync ones; each has its own by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import grpc

from pollard.client._images import ImageLike
from pollard.client._pool import LOCAL_SUBCHANNELS, ChannelPool
from pollard.client._upload import Upload
from pollard.models.v1 import model_service_pb2

P = ParamSpec("P")
T = TypeVar("T")

Images: TypeAlias = Iterable[ImageLike] | AsyncIterable[ImageLike]
"""Images one after the other."""

sleep = asyncio.sleep


async def requests_of(
    images: Images, make: Callable[[ImageLike], T], failures: list[BaseException]
) -> AsyncIterator[T]:
    """Make a request of each image; should one fail to be made, keep the error and end.

    An error in here would reach nobody: grpc only logs it.
    """
    try:
        if isinstance(images, AsyncIterable):
            async for image in images:
                yield await asyncio.to_thread(make, image)
        else:
            for image in images:
                yield await asyncio.to_thread(make, image)
    except Exception as error:
        failures.append(error)


def open_channels(
    number: int,
    address: str,
    options: list[tuple[str, Any]],
    credentials: grpc.ChannelCredentials | None,
    shown: tuple[str, str] | None = None,
) -> grpc.aio.Channel:
    """Open a channel, or a pool of several; they connect with the first requests.

    Raises:
        RuntimeError: There is no running event loop.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # grpc would bind the channel to a loop that asyncio.run() does not use.
        raise RuntimeError(
            "asyncio clients are made inside a coroutine; elsewhere use the sync ones"
        ) from None
    if number > 1:
        pool = ChannelPool(
            [
                _open(address, [*options, LOCAL_SUBCHANNELS], credentials, shown)
                for _ in range(number)
            ]
        )
        return cast("grpc.aio.Channel", pool)  # it has all that stubs use
    return _open(address, options, credentials, shown)


def _open(
    address: str,
    options: list[tuple[str, Any]],
    credentials: grpc.ChannelCredentials | None,
    shown: tuple[str, str] | None,
) -> grpc.aio.Channel:
    if credentials is not None:
        return grpc.aio.secure_channel(address, credentials, options=options)
    interceptors = [kind(shown) for kind in _SHOWING] if shown is not None else []
    return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)


class _Showing:
    """Adds what is shown to the metadata of every call; credentials of gRPC would want TLS."""

    def __init__(self, shown: tuple[str, str]) -> None:
        self._shown = shown

    async def _intercept(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add(*self._shown)
        return await continuation(details._replace(metadata=metadata), request)


class _UnaryUnary(_Showing, grpc.aio.UnaryUnaryClientInterceptor):
    intercept_unary_unary: Any = _Showing._intercept


class _UnaryStream(_Showing, grpc.aio.UnaryStreamClientInterceptor):
    intercept_unary_stream: Any = _Showing._intercept


class _StreamUnary(_Showing, grpc.aio.StreamUnaryClientInterceptor):
    intercept_stream_unary: Any = _Showing._intercept


class _StreamStream(_Showing, grpc.aio.StreamStreamClientInterceptor):
    intercept_stream_stream: Any = _Showing._intercept


# A class for each: grpc puts an interceptor into the list of the first kind that it is.
_SHOWING = (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)


async def close_channels(opened: grpc.aio.Channel | ChannelPool) -> None:
    """Close what `open_channels` returned, and cancel what is in flight."""
    for channel in opened.channels if isinstance(opened, ChannelPool) else (opened,):
        await channel.close()


async def run_blocking(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run something that reads or hashes files, without holding up the event loop."""
    return await asyncio.to_thread(function, *args, **kwargs)


async def send_upload(
    method: grpc.aio.StreamUnaryMultiCallable[
        model_service_pb2.UploadBundleRequest, model_service_pb2.UploadBundleResponse
    ],
    upload: Upload,
    offset: int,
    timeout: float,
) -> model_service_pb2.UploadBundleResponse:
    """Make one attempt at an upload, and cancel it when nothing moves any more."""
    call = method(upload.requests(offset), timeout=timeout)
    answer = asyncio.ensure_future(_answer(call))
    try:
        while True:
            done, _ = await asyncio.wait({answer}, timeout=1.0)
            if done:
                return answer.result()
            if upload.is_idle():
                call.cancel()
                return await answer
    except asyncio.CancelledError:
        call.cancel()
        if upload.stalled:
            raise _stalled() from None
        raise


async def _answer(call: Any) -> model_service_pb2.UploadBundleResponse:
    response: model_service_pb2.UploadBundleResponse = await call
    return response


def _stalled() -> grpc.aio.AioRpcError:
    # A call that is cancelled from this side raises CancelledError and not an RpcError.
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, empty, empty, "the upload stalled")
