"""An image that a visitor drops in, and what two revisions say of it."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any

from aiohttp import BodyPartReader, web

from pollard.services.common import status
from pollard.services.common.errors import ServiceError
from pollard.services.common.status import RelayedError
from pollard.services.models.web import answers
from pollard.services.models.web.answers import Answer
from pollard.services.models.web.asking import Manager
from pollard.services.models.web.vision import PREDICT, Vision

MAX_IMAGE_BYTES = 32 * 1024**2
"""As large as the vision service takes by default."""

MAX_SHOWN_BYTES = 8 * 1024**2
"""Images up to this size come back with the answer where the browser has no script to show them."""

_MAX_FIELD_BYTES = 4096
_MAX_PARTS = 16

_AT_ONCE = 4
"""Images in memory at a time."""

_TYPES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


@dataclass(frozen=True)
class Upload:
    """What the form brought."""

    left: str
    right: str
    image: bytes


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    left: Answer
    right: Answer
    verdict: str
    source: str = ""
    """The image as a data URI; empty where the page's script has it."""


class Trials:
    """Tries images.

    Args:
        vision: Answers.
    """

    def __init__(self, vision: Vision) -> None:
        self._vision = vision
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def address(self, manager: Manager) -> str:
        """Return where the vision service is; empty where none is known."""
        try:
            servers = await manager.servers()
        except ServiceError:
            servers = []
        return self._vision.address(servers)

    async def run(
        self, request: web.Request, manager: Manager, model: str, check_csrf: Any
    ) -> tuple[Upload, Outcome]:
        """Read the form and ask.

        Args:
            request: The form, with its file.
            manager: Asked for the bundle's colours, and where the vision service is.
            model: Name of the model.
            check_csrf: Called with the field of that name, before the file is read.

        Raises:
            web.HTTPException: the form is none, or too large.
        """
        if not manager.visitor.may(PREDICT):
            raise web.HTTPForbidden(text="Images may be sent by those with the role predictor.")
        async with self._turn:
            upload = await _read_form(request, check_csrf)
            address = await self.address(manager)
            if not address:
                raise web.HTTPServiceUnavailable(
                    text="No vision service is known, so nobody can be asked about an image. Start "
                    "one with `pollard serve preprocess --manager` and this service's address."
                )
            left, right = await asyncio.gather(
                self._ask(manager, address, model, upload.left, upload.image),
                self._ask(manager, address, model, upload.right, upload.image),
            )
            verdict = await asyncio.to_thread(answers.compare, left, right)
        scripted = "X-Pollard-Part" in request.headers
        return upload, Outcome(left, right, verdict, "" if scripted else _uri(upload.image))

    async def _ask(
        self, manager: Manager, address: str, model: str, choice: str, image: bytes
    ) -> Answer:
        try:
            response = await self._vision.predict(
                address, model, choice, image, manager.visitor.metadata()
            )
            palette: list[int] = []
            if response.WhichOneof("result") == "segmentation":
                revision = await manager.revision(model, response.revision)
                palette = list(revision.manifest.postprocess.segmentation.palette)
            return await asyncio.to_thread(answers.read, choice, response, palette)
        except (ServiceError, RelayedError) as error:
            return Answer(choice, problem=status.describe(error).message)


async def _read_form(request: web.Request, check_csrf: Any) -> Upload:
    if request.content_type != "multipart/form-data":
        raise web.HTTPUnsupportedMediaType(text="This takes a form with an image.")
    fields: dict[str, str] = {}
    image = b""
    try:
        reader = await request.multipart()
        for _ in range(_MAX_PARTS):
            part = await reader.next()
            if part is None:
                break
            if not isinstance(part, BodyPartReader) or not part.name:
                raise web.HTTPBadRequest(text="The form cannot be read.")
            if part.name == "image":
                # Whatever it is, it is read only for who has a page of ours.
                check_csrf(fields.get("csrf", ""))
                image = await _read_part(part, MAX_IMAGE_BYTES)
            else:
                fields[part.name] = (await _read_part(part, _MAX_FIELD_BYTES)).decode()
    except (ValueError, AssertionError):
        # aiohttp's reader says so of a form that is cut off or has no boundary.
        raise web.HTTPBadRequest(text="The form cannot be read.") from None
    check_csrf(fields.get("csrf", ""))
    if not image:
        raise web.HTTPBadRequest(text="The form has no image. Choose a file, and send it again.")
    return Upload(fields.get("left") or "production", fields.get("right") or "production", image)


async def _read_part(part: BodyPartReader, limit: int) -> bytes:
    content = bytearray()
    while piece := await part.read_chunk(64 * 1024):
        content += piece
        if len(content) > limit:
            raise web.HTTPRequestEntityTooLarge(
                limit, len(content), text=f"The image is larger than {limit // 1024**2} MiB."
            )
    return bytes(content)


def _uri(image: bytes) -> str:
    """Return an image for a browser; empty where it is too large, or none that browsers show."""
    kind = next((kind for start, kind in _TYPES.items() if image.startswith(start)), "")
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        kind = "image/webp"
    if not kind or len(image) > MAX_SHOWN_BYTES:
        return ""
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
