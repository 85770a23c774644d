"""ModelStreamInfer: requests of one stream, answered in their order.

Several requests of a stream run at once; answers leave in the order of the requests. When so many
are under way that no more may be, the stream is not read, and HTTP/2's flow control holds the
client back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.common.lifecycle import cancel
from pollard.services.inference.errors import ServerStopping
from pollard.services.inference.parameters import RequestOptions

_DEPTH = 32
"""Requests of one stream that may be under way; a large one counts as several."""

_BYTES_A_PLACE = 1 << 20

Infer = Callable[[pb.ModelInferRequest], Awaitable[tuple[pb.ModelInferResponse, RequestOptions]]]

_Answer = tuple[asyncio.Task[pb.ModelStreamInferResponse], int]
"""A request under way and the places that it takes."""


async def stream_infer(
    requests: AsyncIterator[bytes],
    parse: Callable[[bytes], pb.ModelInferRequest],
    infer: Infer,
    words: Callable[[Exception], str],
    *,
    strict: bool,
    stopping: asyncio.Event,
) -> AsyncGenerator[bytes, None]:
    """Answer the serialised requests of a stream with serialised ModelStreamInferResponses.

    Args:
        requests: The stream.
        parse: Makes a request of bytes.
        infer: Runs a request.
        words: Gives the message of an error.
        strict: Whether the first request that fails ends the stream with its error.
        stopping: When it is set, no more is read, and what was is answered.

    Raises:
        ServiceError: of the first request that failed, if `strict`.
        ServerStopping: the server stops; everything that was read has been answered.
    """
    answers: asyncio.Queue[_Answer | None] = asyncio.Queue()
    places = asyncio.Semaphore(_DEPTH)

    async def one(data: bytes) -> pb.ModelStreamInferResponse:
        request = None
        try:
            request = parse(data)
            response, options = await infer(request)
        except Exception as error:
            if strict:
                raise
            failed = pb.ModelInferResponse()
            if request is not None:
                failed.id = request.id
                failed.model_name = request.model_name
                failed.model_version = request.model_version
            return pb.ModelStreamInferResponse(error_message=words(error), infer_response=failed)
        if options.final_response:
            response.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)

    async def read() -> None:
        try:
            await places.acquire()
            async for data in requests:
                taken = min(_DEPTH, 1 + len(data) // _BYTES_A_PLACE)
                answers.put_nowait((asyncio.create_task(one(data)), taken))
                for _ in range(taken):
                    await places.acquire()
        finally:
            answers.put_nowait(None)

    reading = asyncio.create_task(read())
    halting = asyncio.create_task(_halt(stopping, reading))
    try:
        while (item := await answers.get()) is not None:
            task, taken = item
            response = await task
            for _ in range(taken):
                places.release()
            yield response.SerializeToString()
        if stopping.is_set():
            raise ServerStopping("the server is stopping; open the stream to another one")
        # What broke the stream on the way in, if anything did.
        await reading
    finally:
        await cancel(halting, reading)
        left = [answers.get_nowait() for _ in range(answers.qsize())]
        await cancel(*(item[0] for item in left if item is not None))


async def _halt(stopping: asyncio.Event, reading: asyncio.Task[None]) -> None:
    await stopping.wait()
    reading.cancel()
