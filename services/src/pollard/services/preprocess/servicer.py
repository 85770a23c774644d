"""`PreprocessService` and `VisionService` over gRPC: decode, call, encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import grpc

from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.preprocess.v1 import preprocess_service_pb2_grpc as preprocess_grpc
from pollard.runtime.tensors import FROM_NUMPY
from pollard.runtime.transforms import Geometry
from pollard.services.common.routing import PRODUCTION
from pollard.services.common.status import describe
from pollard.services.preprocess.contents import ImageContents
from pollard.services.preprocess.encoding import read_options, to_explanation, to_response
from pollard.services.preprocess.errors import (
    RequestExpired,
    RequestInvalid,
)
from pollard.services.preprocess.explaining import Explainer
from pollard.services.preprocess.prediction import (
    MAX_IMAGES,
    Batch,
    Prediction,
    Predictor,
)
from pollard.services.preprocess.snapshot import Selector
from pollard.services.preprocess.streams import in_order
from pollard.vision.v1 import vision_service_pb2 as vision_pb
from pollard.vision.v1 import vision_service_pb2_grpc as vision_grpc

PREPROCESS_SERVICE = "pollard.preprocess.v1.PreprocessService"
VISION_SERVICE = "pollard.vision.v1.VisionService"

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", preprocess_pb.TransformStreamRequest, vision_pb.PredictStreamRequest)


class _Deadlines:
    """The caller's deadline, capped."""

    def __init__(self, max_request_seconds: float) -> None:
        self._max_request_seconds = max_request_seconds

    def deadline(self, context: Context) -> float:
        """Return when the answer must be there, by the loop's clock.

        Raises:
            RequestExpired: it should have been there already.
        """
        left = context.time_remaining()
        seconds = self._max_request_seconds
        if left is not None:
            seconds = min(seconds, left)
        if seconds <= 0:
            raise RequestExpired("the request's deadline passed before it was begun")
        return asyncio.get_running_loop().time() + seconds

    @contextlib.asynccontextmanager
    async def within(self, context: Context) -> AsyncIterator[float]:
        """Run a block until the deadline; gives the deadline.

        Raises:
            RequestExpired: the block was not done by then.
        """
        deadline = self.deadline(context)
        try:
            async with asyncio.timeout_at(deadline):
                yield deadline
        except TimeoutError as error:
            raise RequestExpired(
                f"the request was not done within its deadline or "
                f"{self._max_request_seconds:g} s, the longest that a request may take",
                max_request_seconds=self._max_request_seconds,
            ) from error


class PreprocessServicer(preprocess_grpc.PreprocessServiceServicer):
    """Answers `pollard.preprocess.v1.PreprocessService`."""

    def __init__(
        self, predictor: Predictor, contents: ImageContents, max_request_seconds: float
    ) -> None:
        """Serve ``predictor``."""
        self._predictor = predictor
        self._contents = contents
        self._deadlines = _Deadlines(max_request_seconds)

    async def Transform(
        self, request: preprocess_pb.TransformRequest, context: Context
    ) -> preprocess_pb.TransformResponse:
        """Transform images to one tensor."""
        selector = _selector(request.model)
        _check_count(len(request.images))
        async with self._deadlines.within(context):
            contents = await self._contents.all(request.images)
            batch = await self._predictor.transform(selector, contents)
        return _transformed(batch)

    async def TransformStream(
        self,
        request_iterator: AsyncIterator[preprocess_pb.TransformStreamRequest],
        context: Context,
    ) -> AsyncIterator[preprocess_pb.TransformStreamResponse]:
        """Transform images as they come; an image's error is its answer."""
        turns = self._predictor.turns()

        async def work(
            item: tuple[preprocess_pb.TransformStreamRequest, Selector],
        ) -> preprocess_pb.TransformStreamResponse:
            request, selector = item
            response = preprocess_pb.TransformStreamResponse(id=request.id)
            try:
                async with self._deadlines.within(context):
                    content = await self._contents.one(request.image)
                    batch = await self._predictor.transform(selector, [content], turns)
                response.response.CopyFrom(_transformed(batch))
            except Exception as error:  # whatever it is, the other images are answered
                response.error.CopyFrom(_stream_error(error))
            return response

        async for answer in in_order(_with_selectors(request_iterator), work):
            yield answer


class VisionServicer(vision_grpc.VisionServiceServicer):
    """Answers `pollard.vision.v1.VisionService`."""

    def __init__(
        self,
        predictor: Predictor,
        explainer: Explainer,
        contents: ImageContents,
        max_request_seconds: float,
    ) -> None:
        """Serve ``predictor`` and ``explainer``."""
        self._predictor = predictor
        self._contents = contents
        self._explainer = explainer
        self._deadlines = _Deadlines(max_request_seconds)

    async def Predict(
        self, request: vision_pb.PredictRequest, context: Context
    ) -> vision_pb.PredictResponse:
        """Answer for one image."""
        selector = _selector(request.model)
        options = read_options(request.options)
        async with self._deadlines.within(context) as deadline:
            content = await self._contents.one(request.image)
            prediction = await self._predictor.predict(
                selector,
                content,
                deadline=deadline,
                options=options,
            )
        return to_response(prediction)

    async def PredictBatch(
        self, request: vision_pb.PredictBatchRequest, context: Context
    ) -> vision_pb.PredictBatchResponse:
        """Answer for several images by one revision; a bad one gets its own error."""
        selector = _selector(request.model)
        _check_count(len(request.images))
        async with self._deadlines.within(context) as deadline:
            contents = await self._contents.each(request.images)
            answers = await self._predictor.predict_batch(
                selector,
                contents,
                deadline=deadline,
                options=read_options(request.options),
            )
        return vision_pb.PredictBatchResponse(
            results=[
                vision_pb.PredictResult(response=to_response(answer))
                if isinstance(answer, Prediction)
                else vision_pb.PredictResult(error=_stream_error(answer))
                for answer in answers
            ]
        )

    async def PredictStream(
        self, request_iterator: AsyncIterator[vision_pb.PredictStreamRequest], context: Context
    ) -> AsyncIterator[vision_pb.PredictStreamResponse]:
        """Answer for images as they come; an image's error is its answer."""
        turns = self._predictor.turns()

        async def with_options() -> AsyncIterator[
            tuple[vision_pb.PredictStreamRequest, Selector, vision_pb.PredictOptions]
        ]:
            options = vision_pb.PredictOptions()
            async for request, selector in _with_selectors(request_iterator):
                options = request.options if request.HasField("options") else options
                yield request, selector, options

        async def work(
            item: tuple[vision_pb.PredictStreamRequest, Selector, vision_pb.PredictOptions],
        ) -> vision_pb.PredictStreamResponse:
            request, selector, options = item
            response = vision_pb.PredictStreamResponse(id=request.id)
            try:
                async with self._deadlines.within(context) as deadline:
                    content = await self._contents.one(request.image)
                    prediction = await self._predictor.predict(
                        selector,
                        content,
                        deadline=deadline,
                        options=read_options(options),
                        turns=turns,
                    )
                response.result.response.CopyFrom(to_response(prediction))
            except Exception as error:  # whatever it is, the other images are answered
                response.result.error.CopyFrom(_stream_error(error))
            return response

        async for answer in in_order(with_options(), work):
            yield answer

    async def Explain(
        self, request: vision_pb.ExplainRequest, context: Context
    ) -> vision_pb.ExplainResponse:
        """Show which parts of an image a classification rests on."""
        selector = _selector(request.model)
        async with self._deadlines.within(context) as deadline:
            content = await self._contents.one(request.image)
            explanation = await self._explainer.explain(
                selector,
                content,
                class_index=request.class_index if request.HasField("class_index") else None,
                painted=request.overlay,
                deadline=deadline,
            )
        return to_explanation(explanation)


def _selector(message: preprocess_pb.ModelSelector) -> Selector:
    choice = message.WhichOneof("choice")
    return Selector(
        message.model,
        revision=message.revision if choice == "revision" else None,
        alias=message.alias if choice == "alias" else PRODUCTION,
        sticky_key=message.sticky_key,
    )


async def _with_selectors(requests: AsyncIterator[M]) -> AsyncIterator[tuple[M, Selector]]:
    """Give each message of a stream its model: its own, or that of the last one that had one.

    Raises:
        RequestInvalid: the first message names no model.
    """
    selector: Selector | None = None
    async for request in requests:
        if request.HasField("model"):
            selector = _selector(request.model)
        if selector is None:
            raise RequestInvalid("the first message of a stream must name the model")
        yield request, selector


def _check_count(images: int) -> None:
    if not 1 <= images <= MAX_IMAGES:
        raise RequestInvalid(
            f"the request has {images} images; send 1 to {MAX_IMAGES}", images=images
        )


def _stream_error(error: BaseException) -> preprocess_pb.StreamError:
    outcome = describe(error)
    return preprocess_pb.StreamError(
        code=outcome.code.value[0], message=outcome.message, reason=outcome.reason
    )


def _transformed(batch: Batch) -> preprocess_pb.TransformResponse:
    return preprocess_pb.TransformResponse(
        model=batch.revision.model,
        revision=batch.revision.revision,
        tensor=preprocess_pb.Tensor(
            name=batch.revision.input.name,
            datatype=FROM_NUMPY[batch.array.dtype],
            shape=batch.array.shape,
            content=batch.array.tobytes(),
        ),
        geometries=[_geometry(geometry) for geometry in batch.geometries],
    )


def _geometry(geometry: Geometry) -> preprocess_pb.Geometry:
    return preprocess_pb.Geometry(
        width=geometry.width,
        height=geometry.height,
        scale_x=geometry.scale_x,
        scale_y=geometry.scale_y,
        offset_x=geometry.offset_x,
        offset_y=geometry.offset_y,
        transposed=geometry.transposed,
    )
