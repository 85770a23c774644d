"""The bytes of the images that requests bring or name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.runtime.errors import RuntimeFault
from pollard.services.common.errors import ServiceError
from pollard.services.preprocess.errors import RequestInvalid
from pollard.services.preprocess.fetching import Fetcher
from pollard.services.preprocess.prediction import Failure


class ImageContents:
    """Takes images as they come in a request. Belongs to the event loop's thread."""

    def __init__(self, fetcher: Fetcher, max_total_bytes: int) -> None:
        """Take the parts.

        Args:
            fetcher: Gets what is named by a URI.
            max_total_bytes: Largest sum of the fetched images of one request: as much as a
                request could bring itself.
        """
        self._fetcher = fetcher
        self._max_total_bytes = max_total_bytes

    async def one(self, image: preprocess_pb.Image) -> bytes:
        """Return the bytes of a request's only image.

        Raises:
            RequestInvalid: there are none.
            UriRefused, UriUnreachable, ImageTooLarge: as `Fetcher.fetch`.
        """
        outcome = (await self.each([image]))[0]
        if isinstance(outcome, bytes):
            return outcome
        raise outcome

    async def all(self, images: Sequence[preprocess_pb.Image]) -> list[bytes]:
        """Return the bytes of all images.

        Raises:
            RequestInvalid, UriRefused, UriUnreachable, ImageTooLarge: as `one`, for the first bad
                image; ``metadata["image_index"]`` says which.
        """
        contents = []
        for outcome in await self.each(images):
            if not isinstance(outcome, bytes):
                raise outcome
            contents.append(outcome)
        return contents

    async def each(self, images: Sequence[preprocess_pb.Image]) -> list[bytes | Failure]:
        """Return the bytes of each image, or why there are none."""
        total = 0

        async def get(index: int, image: preprocess_pb.Image) -> bytes | Failure:
            nonlocal total
            source = image.WhichOneof("source")
            if source == "content":
                return image.content
            if source is None:
                return RequestInvalid(
                    "the image has no content; send the bytes of an image file", image_index=index
                )
            try:
                content = await self._fetcher.fetch(image.uri)
            except (RuntimeFault, ServiceError) as error:
                error.metadata["image_index"] = str(index)
                return error
            total += len(content)
            if total > self._max_total_bytes:
                return RequestInvalid(
                    f"the images that this request names have more than {self._max_total_bytes} "
                    "bytes together; name fewer",
                    image_index=index,
                    limit_bytes=self._max_total_bytes,
                )
            return content

        if all(image.WhichOneof("source") != "uri" for image in images):
            # The common case, without a task for each.
            return [await get(index, image) for index, image in enumerate(images)]
        tasks = [asyncio.create_task(get(index, image)) for index, image in enumerate(images)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
