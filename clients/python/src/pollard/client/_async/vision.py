"""Images in, answers out; images in, tensors out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from pollard.client import _channel, _convert, _images, _predictions
from pollard.client._async import _io
from pollard.client._async._base import AsyncBaseClient
from pollard.client._retrying import RetryPolicy
from pollard.client.errors import RequestFailed
from pollard.client.types import Explanation, Prediction, Transformed
from pollard.preprocess.v1 import preprocess_service_pb2, preprocess_service_pb2_grpc
from pollard.vision.v1 import vision_service_pb2, vision_service_pb2_grpc

_PREDICT_BATCH = "/pollard.vision.v1.VisionService/PredictBatch"
_PREDICT_STREAM = "/pollard.vision.v1.VisionService/PredictStream"
_TRANSFORM_STREAM = "/pollard.preprocess.v1.PreprocessService/TransformStream"

_STREAM_TIMEOUT_SECONDS = 3600.0


class AsyncVisionClient(AsyncBaseClient):
    """Asks a preprocess server, which serves VisionService and PreprocessService."""

    def __init__(
        self,
        address: str = _channel.DEFAULT_VISION_ADDRESS,
        *,
        timeout: float = _channel.DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = _channel.DEFAULT_MAX_MESSAGE_BYTES,
        tls: _channel.Tls | None = None,
        token: str | None = None,
        connections: int = 1,
    ) -> None:
        """Make a client; the arguments are those of every client (`AsyncBaseClient`)."""
        super().__init__(
            address,
            timeout=timeout,
            retry=retry,
            max_message_bytes=max_message_bytes,
            tls=tls,
            token=token,
            connections=connections,
        )
        self._vision = vision_service_pb2_grpc.VisionServiceStub(self._channel)
        self._preprocess = preprocess_service_pb2_grpc.PreprocessServiceStub(self._channel)

    async def predict(
        self,
        image: _images.ImageLike,
        model: str,
        *,
        revision: int | None = None,
        alias: str | None = None,
        top_k: int | None = None,
        embedding: bool = False,
        augmentation: str | None = None,
        score_threshold: float | None = None,
        sticky_key: str | None = None,
        timeout: float | None = None,
    ) -> Prediction:
        """Answer for one image.

        Args:
            image: Bytes of an image file, a path to one, a Pillow image, or pixels as uint8
                (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
            model: Model name.
            revision: Revision to ask; by default the one that the alias points at.
            alias: Alias to ask; by default "production".
            top_k: Number of labels; by default what the bundle says.
            embedding: Also give the embedding, where the bundle has one.
            augmentation: Average over the image and its mirror image with "flip", over corners and
                centre with "five_crop"; by default neither.
            score_threshold: Boxes with a lower score, 0 to 1, are left out; by default what the
                bundle says.
            sticky_key: Requests with the same key get the same revision of a rollout.
            timeout: Deadline in seconds; by default the client's.

        Raises:
            InvalidArgument: The image is damaged, empty, too large or none at all.
            NotFound: There is no such model, revision or alias.
            RequestFailed: Anything else that the server answers.
            TypeError, ValueError: `image` or another argument is nothing of the kind.
            OSError: A path cannot be read.
        """
        request = vision_service_pb2.PredictRequest(
            model=_convert.selector(model, revision, alias, sticky_key),
            image=_convert.image(image),
            options=_predictions.options(top_k, embedding, augmentation, score_threshold),
        )
        name = "/pollard.vision.v1.VisionService/Predict"
        return _predictions.prediction(
            await self._call(name, self._vision.Predict, request, timeout)
        )

    async def predict_batch(
        self,
        images: Sequence[_images.ImageLike],
        model: str,
        *,
        revision: int | None = None,
        alias: str | None = None,
        top_k: int | None = None,
        embedding: bool = False,
        augmentation: str | None = None,
        score_threshold: float | None = None,
        sticky_key: str | None = None,
        timeout: float | None = None,
    ) -> list[Prediction | RequestFailed]:
        """Answer for 1 to 256 images by one revision.

        A bad image does not keep the others from being answered: its place in the result holds
        the error that `predict` would raise.

        Args:
            images: The images, each as `predict` takes it; together they must fit into one message.
            model: Model name.
            revision: Revision to ask; by default the one that the alias points at.
            alias: Alias to ask; by default "production".
            top_k: Number of labels; by default what the bundle says.
            embedding: Also give the embeddings, where the bundle has one.
            augmentation: Average over the image and its mirror image with "flip", over corners and
                centre with "five_crop"; by default neither.
            score_threshold: Boxes with a lower score, 0 to 1, are left out; by default what the
                bundle says.
            sticky_key: Requests with the same key get the same revision of a rollout.
            timeout: Deadline in seconds; by default the client's.

        Raises:
            NotFound: There is no such model, revision or alias.
            RequestFailed: Anything else that fails the whole request.
            TypeError, ValueError: An image or another argument is nothing of the kind.
            OSError: A path cannot be read.
        """
        request = vision_service_pb2.PredictBatchRequest(
            model=_convert.selector(model, revision, alias, sticky_key),
            images=[
                preprocess_service_pb2.Image(content=content)
                for content in _images.encoded_all(images)
            ],
            options=_predictions.options(top_k, embedding, augmentation, score_threshold),
        )
        response = await self._call(_PREDICT_BATCH, self._vision.PredictBatch, request, timeout)
        return [
            _predictions.predict_result(result, self.address, _PREDICT_BATCH)
            for result in response.results
        ]

    def predict_stream(
        self,
        images: _io.Images,
        model: str,
        *,
        revision: int | None = None,
        alias: str | None = None,
        top_k: int | None = None,
        embedding: bool = False,
        augmentation: str | None = None,
        score_threshold: float | None = None,
        sticky_key: str | None = None,
        timeout: float = _STREAM_TIMEOUT_SECONDS,
    ) -> AsyncIterator[Prediction | RequestFailed]:
        """Answer for images as they come, in their order, such as for the frames of a video.

        For a bad image the error that `predict` would raise is yielded, and the stream goes on.
        Images are taken only as fast as answers are: at most 16 are in work at the server. A
        stream is not tried again when the connection is lost. Close the generator to end early.

        Args:
            images: The images, each as `predict` takes it.
            model: Model name.
            revision: Revision to ask; by default the one that the alias points at for each image.
            alias: Alias to ask; by default "production".
            top_k: Number of labels; by default what the bundle says.
            embedding: Also give the embeddings, where the bundle has one.
            augmentation: Average over the image and its mirror image with "flip", over corners and
                centre with "five_crop"; by default neither.
            score_threshold: Boxes with a lower score, 0 to 1, are left out; by default what the
                bundle says.
            sticky_key: Requests with the same key get the same revision of a rollout.
            timeout: Deadline of the whole stream in seconds.

        Raises:
            RequestFailed: The stream itself failed.
            TypeError, ValueError: An image or another argument is nothing of the kind.
            OSError: A path cannot be read.
        """
        selector = _convert.selector(model, revision, alias, sticky_key)
        options = _predictions.options(top_k, embedding, augmentation, score_threshold)

        def request(image: _images.ImageLike) -> vision_service_pb2.PredictStreamRequest:
            return vision_service_pb2.PredictStreamRequest(
                model=selector, options=options, image=_convert.image(image)
            )

        def result(
            response: vision_service_pb2.PredictStreamResponse,
        ) -> Prediction | RequestFailed:
            return _predictions.predict_result(response.result, self.address, _PREDICT_STREAM)

        return self._stream(
            _PREDICT_STREAM, self._vision.PredictStream, images, request, result, timeout
        )

    async def explain(
        self,
        image: _images.ImageLike,
        model: str,
        *,
        revision: int | None = None,
        alias: str | None = None,
        class_index: int | None = None,
        overlay: bool = False,
        sticky_key: str | None = None,
        timeout: float | None = None,
    ) -> Explanation:
        """Tell which parts of an image a classification rests on.

        The model is asked about hundreds of partly covered copies of the image, so that it takes
        as much longer than `predict`.

        Args:
            image: The image, as `predict` takes it.
            model: Model name; its task must be classification.
            revision: Revision to ask; by default the one that the alias points at.
            alias: Alias to ask; by default "production".
            class_index: Class to explain; by default the best one.
            overlay: Also give the map painted over the image.
            sticky_key: Requests with the same key get the same revision of a rollout.
            timeout: Deadline in seconds; by default the client's.

        Raises:
            InvalidArgument: The image is bad, or there is no such class.
            FailedPrecondition: The model is no classifier.
            Unavailable: Too many explanations are asked for at once.
            RequestFailed, TypeError, ValueError, OSError: As `predict`.
        """
        request = vision_service_pb2.ExplainRequest(
            model=_convert.selector(model, revision, alias, sticky_key),
            image=_convert.image(image),
            class_index=class_index,
            overlay=overlay,
        )
        name = "/pollard.vision.v1.VisionService/Explain"
        response = await self._call(name, self._vision.Explain, request, timeout)
        return _predictions.explanation(response)

    def transform_stream(
        self,
        images: _io.Images,
        model: str,
        *,
        revision: int | None = None,
        alias: str | None = None,
        sticky_key: str | None = None,
        timeout: float = _STREAM_TIMEOUT_SECONDS,
    ) -> AsyncIterator[Transformed | RequestFailed]:
        """Make images into input tensors, batches of one, as they come and in their order.

        Errors, flow and ending are those of `predict_stream`.

        Args:
            images: The images, each as `predict` takes it.
            model: Model name.
            revision: Revision whose steps to use; by default the one the alias points at.
            alias: Alias whose revision to use; by default "production".
            sticky_key: Requests with the same key get the same revision of a rollout.
            timeout: Deadline of the whole stream in seconds.

        Raises:
            RequestFailed, TypeError, ValueError, OSError: As `predict_stream`.
        """
        selector = _convert.selector(model, revision, alias, sticky_key)

        def request(image: _images.ImageLike) -> preprocess_service_pb2.TransformStreamRequest:
            return preprocess_service_pb2.TransformStreamRequest(
                model=selector, image=_convert.image(image)
            )

        def result(
            response: preprocess_service_pb2.TransformStreamResponse,
        ) -> Transformed | RequestFailed:
            return _convert.transform_result(response, self.address, _TRANSFORM_STREAM)

        return self._stream(
            _TRANSFORM_STREAM, self._preprocess.TransformStream, images, request, result, timeout
        )

    async def transform(
        self,
        images: Sequence[_images.ImageLike],
        model: str,
        *,
        revision: int | None = None,
        alias: str | None = None,
        sticky_key: str | None = None,
        timeout: float | None = None,
    ) -> Transformed:
        """Make 1 to 256 images into one input tensor, by the revision's own steps.

        Args:
            images: The images, each as `predict` takes it.
            model: Model name.
            revision: Revision whose steps to use; by default the one the alias points at.
            alias: Alias whose revision to use; by default "production".
            sticky_key: Requests with the same key get the same revision of a rollout.
            timeout: Deadline in seconds; by default the client's.

        Raises:
            InvalidArgument: An image is bad; `metadata["image_index"]` says which.
            NotFound: There is no such model, revision or alias.
            RequestFailed: Anything else that the server answers.
        """
        request = preprocess_service_pb2.TransformRequest(
            model=_convert.selector(model, revision, alias, sticky_key),
            images=[
                preprocess_service_pb2.Image(content=content)
                for content in _images.encoded_all(images)
            ],
        )
        name = "/pollard.preprocess.v1.PreprocessService/Transform"
        return _convert.transformed(
            await self._call(name, self._preprocess.Transform, request, timeout)
        )
