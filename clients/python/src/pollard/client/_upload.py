"""One upload: what is sent, how far it is, and whether it still moves."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from pollard.client._bundle import BundleTar
from pollard.client.errors import (
    Aborted,
    DeadlineExceeded,
    Internal,
    OutOfRange,
    RequestFailed,
    Unavailable,
)
from pollard.client.types import Progress
from pollard.models.v1 import model_service_pb2

ProgressCallback = Callable[[Progress], None]
"""Called as bytes go out or come in; by the sync clients possibly from another thread."""

# A server that checks a large bundle after its last byte is silent for longer than one that
# receives it.
_CHECK_SECONDS = 300.0
_SLOWEST_BYTES_PER_SECOND = 64 * 1024

_STATUS_LOST = "Internal error from Core"
"""What grpc's asyncio client says when the server ended the call while a message was on its way
out: it then forgets the status that the server gave (grpc/grpc#36066)."""


def transfer_timeout(total_bytes: int) -> float:
    """Return the deadline of a whole transfer in seconds: generous, but never none."""
    return 600.0 + total_bytes / _SLOWEST_BYTES_PER_SECOND


@dataclass
class Upload:
    """The state of one upload over all its attempts."""

    tar: BundleTar
    parent: str
    notes: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    alias: str = ""
    allow_signature_change: bool = False
    origin: model_service_pb2.Origin | None = None
    idle_seconds: float = 60.0
    progress: ProgressCallback | None = None
    upload_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    error: Exception | None = None
    """What went wrong on this side while requests were made; grpc would only say "cancelled"."""
    stalled: bool = False
    """Whether the last attempt was given up because nothing moved."""
    _sent: int = 0
    _moved: float = 0.0

    def requests(self, offset: int) -> Iterator[model_service_pb2.UploadBundleRequest]:
        """Yield the messages of one attempt that begins at `offset`."""
        self.stalled = False
        self._moved = time.monotonic()
        try:
            yield model_service_pb2.UploadBundleRequest(
                header=model_service_pb2.UploadHeader(
                    parent=self.parent,
                    upload_id=self.upload_id,
                    write_offset=offset,
                    total_bytes=self.tar.total_bytes,
                    bundle_sha256=self.tar.bundle_sha256,
                    notes=self.notes,
                    labels=self.labels,
                    alias=self.alias,
                    allow_signature_change=self.allow_signature_change,
                    origin=self.origin,
                )
            )
            self._sent = offset
            for chunk in self.tar.chunks(offset):
                yield model_service_pb2.UploadBundleRequest(data=chunk)
                self._sent += len(chunk)
                self._moved = time.monotonic()
                if self.progress is not None:
                    self.progress(Progress(self._sent, self.tar.total_bytes))
        except Exception as error:
            self.error = error
            raise

    def is_idle(self) -> bool:
        """Say whether nothing has moved for too long; the attempt should then be given up."""
        allowed = (
            self.idle_seconds
            if self._sent < self.tar.total_bytes
            else max(self.idle_seconds, _CHECK_SECONDS)
        )
        self.stalled = time.monotonic() - self._moved > allowed
        return self.stalled

    def failure(self, failure: RequestFailed) -> RequestFailed:
        """Return what an attempt really failed of: one that stalled was only cancelled by us."""
        if not self.stalled:
            return failure
        return DeadlineExceeded(
            f"nothing of the upload moved for {self.idle_seconds:g} s; {self._sent} of "
            f"{self.tar.total_bytes} bytes had been sent",
            details=failure.details,
            address=failure.address,
            method=failure.method,
        )

    def may_resume(self, failure: RequestFailed) -> bool:
        """Say whether a failed attempt can go on from what the server has on disk."""
        # OUT_OF_RANGE and ABORTED: an earlier attempt of this upload wrote more than was known,
        # or had not ended on the server when the next one came. What was refused with a status that
        # was lost is refused again.
        return (
            self.stalled
            or isinstance(failure, Unavailable | OutOfRange | Aborted)
            or (isinstance(failure, Internal) and failure.message == _STATUS_LOST)
        )
