"""A file of a bundle for a browser: its report."""

from __future__ import annotations

from aiohttp import web

from pollard.services.common.errors import NotFound
from pollard.services.models import downloads
from pollard.services.models.blobs import Blobs
from pollard.services.models.store import Store
from pollard.services.models.web.guard import REPORT_HEADERS

REPORT = "report.html"

MAX_BYTES = 64 * 1024**2
"""Longer reports are not shown; `pollard models pull` fetches them."""


async def send(
    request: web.Request, store: Store, blobs: Blobs, model: str, number: int
) -> web.StreamResponse:
    """Send the report of a revision's bundle, checked against its digest while it is read.

    Raises:
        NotFound: there is no such revision, or its bundle has no report.
        DataLoss: it is damaged.
    """
    files = await downloads.find_files(store, (model, number), [])
    report = [file for file in files if file.path == REPORT]
    if not report:
        raise NotFound(
            f"the bundle of revision {number} has no {REPORT}", reason="FILE_NOT_FOUND", path=REPORT
        )
    if report[0].size_bytes > MAX_BYTES:
        raise NotFound(
            f"the report is longer than {MAX_BYTES} bytes; fetch it with `pollard models pull "
            f"{model} {number}`",
            reason="REPORT_TOO_LARGE",
        )
    response = web.StreamResponse(
        headers={**REPORT_HEADERS, "Content-Type": "text/html; charset=utf-8"}
    )
    response.content_length = report[0].size_bytes
    await response.prepare(request)
    # What is damaged shows after the last piece but one: the browser sees that the end is missing.
    async for piece in downloads.read_files(blobs, report):
        await response.write(piece.data)
    return response
