# Made by clients/python/generate_sync.py from _async/vision.py; change that file instead.
"""Images in, answers out; images in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence

from pollard.client import _channel, _convert, _images
from pollard.client._sync._base import BaseClient
from pollard.client.types import Prediction, Transformed
from pollard.preprocess.v1 import preprocess_service_pb2, preprocess_service_pb2_grpc
from pollard.vision.v1 import vision_service_pb2, vision_service_pb2_grpc


class VisionClient(BaseClient):
    """Asks a preprocess server, which serves VisionService and PreprocessService."""

    def __init__(
        self,
        address: str = _channel.DEFAULT_VISION_ADDRESS,
        *,
        timeout: float = _channel.DEFAULT_TIMEOUT_SECONDS,
        retry: _channel.RetryPolicy | None = None,
        max_message_bytes: int = _channel.DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """Make a client; the arguments are those of every client (`BaseClient`)."""
        super().__init__(address, timeout=timeout, retry=retry, max_message_bytes=max_message_bytes)
        self._vision = vision_service_pb2_grpc.VisionServiceStub(self._channel)
        self._preprocess = preprocess_service_pb2_grpc.PreprocessServiceStub(self._channel)

    def predict(
        self,
        image: _images.ImageLike,
        model: str,
        *,
        revision: int | None = None,
        alias: str | None = None,
        top_k: int | None = None,
        embedding: bool = False,
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
            options=_convert.options(top_k, embedding),
        )
        name = "/pollard.vision.v1.VisionService/Predict"
        return _convert.prediction(self._call(name, self._vision.Predict, request, timeout))

    def transform(
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
        return _convert.transformed(self._call(name, self._preprocess.Transform, request, timeout))
