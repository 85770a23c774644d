"""Blobs in S3, or in what speaks its protocol.

What S3 refuses for the moment – an answer of 5xx, a broken or a slow connection – is tried again
with growing pauses, each request for itself, and then is :class:`Unavailable`. A blob is put whole
or in parts, appears only when it is complete, and is read back before anything refers to it. Parts
that S3 has already are not sent again, whichever manager sent them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import fsspec.asyn
import structlog
from botocore.exceptions import NoCredentialsError
from s3fs import S3FileSystem

from pollard.services.common.errors import (
    DataLoss,
    FailedPrecondition,
    ServiceError,
    StartupError,
    Unavailable,
)
from pollard.services.common.redact import without_secrets
from pollard.services.models.blobs import (
    OWNER,
    PIECE_BYTES,
    Blobs,
    BlobUrl,
    UrlRules,
    blob_of,
    blob_path,
)
from pollard.services.models.presigned import Presigner

T = TypeVar("T")

RETRY_SECONDS = 30.0
"""How long a request is tried again."""
REQUEST_SECONDS = 20.0
"""Longest time for one request; S3 that is slower is as good as none."""

_PART_BYTES = 8 * 1024 * 1024
"""Size of the parts of a blob of up to 80 GB: S3 takes 10,000 of them."""
_MAX_PARTS = 10_000
_RANGE_PIECES = 4
"""Pieces that are read from S3 by one request."""
_FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 3.0

_log = structlog.get_logger("pollard.blobs")


class S3Blobs(Blobs):
    """Blobs below a prefix of a bucket. Keys come from the usual places of AWS tools.

    Args:
        where: ``s3://BUCKET/PREFIX``.
        endpoint: URL of an S3 that is not Amazon's; empty for Amazon's.
        retry_seconds: How long a request is tried again.
        request_seconds: Longest time for one request.
        urls: How presigned URLs are made for others; None makes none.

    Raises:
        StartupError: it names no bucket, or what it names is no URL.
    """

    shared = True

    def __init__(
        self,
        where: str,
        endpoint: str = "",
        *,
        retry_seconds: float = RETRY_SECONDS,
        request_seconds: float = REQUEST_SECONDS,
        urls: UrlRules | None = None,
    ) -> None:
        self._bucket, _, prefix = where.removeprefix("s3://").strip("/").partition("/")
        if not self._bucket:
            raise StartupError(f"--blobs {where!r} names no bucket: s3://BUCKET/PREFIX")
        self._prefix = f"{prefix}/" if prefix else ""
        self.name = f"s3://{self._bucket}/{prefix}"
        self._retry_seconds = retry_seconds
        self._request_seconds = request_seconds
        self._files = self._reached_by(endpoint)
        self._signer: Presigner | None = None
        if urls is not None:
            # The name under which it is asked is part of what is signed.
            reached = self._reached_by(urls.endpoint) if urls.endpoint else self._files
            self._signer = Presigner(reached, self._bucket, urls.seconds)

    def _reached_by(self, endpoint: str) -> S3FileSystem:
        try:
            files = S3FileSystem(
                endpoint_url=endpoint or None,
                config_kwargs={
                    "connect_timeout": min(5.0, self._request_seconds),
                    "read_timeout": self._request_seconds,
                    # Trying again is done here, where it is known for how long.
                    "retries": {"mode": "standard", "total_max_attempts": 1},
                    # Left to itself, URLs are signed in the old way, which newer regions refuse.
                    "signature_version": "s3v4",
                },
                use_listings_cache=False,
                skip_instance_cache=True,
            )
        except ValueError as error:
            raise StartupError(f"{without_secrets(endpoint)!r} is no URL of an S3") from error
        files.retries = 1
        return files

    def check(self) -> None:
        """Look into the bucket, once and for all: a wrong name should be known at the start."""
        try:
            self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        except (ServiceError, OSError, ValueError) as error:
            raise StartupError(f"the blobs cannot be kept in {self.name}: {error}") from error

    def owner(self) -> str:
        """Read the owner's mark."""
        try:
            return self._get(self._prefix + OWNER, "").decode("ascii", "replace").strip()
        except FileNotFoundError:
            return ""

    def set_owner(self, installation: str) -> None:
        """Write the owner's mark, unless there is one."""
        if not self.owner():
            with self._for_writing():
                self._call("put_object", Key=self._prefix + OWNER, Body=installation.encode())

    def disown(self) -> None:
        """Remove the owner's mark."""
        with self._for_writing():
            self._call("delete_object", Key=self._prefix + OWNER)

    def adopt(self, file: Path, sha256: str) -> None:
        """Put the file, unless what S3 has is whole, and read it back."""
        size = file.stat().st_size
        if self._is_whole(sha256, size):
            return
        with self._for_writing():
            if size <= _PART_BYTES:
                self._call("put_object", Key=self._key(sha256), Body=file.read_bytes())
            else:
                self._put_parts(file, size, self._key(sha256))
        actual = self.rehash(sha256)
        if actual != sha256:
            raise DataLoss(
                f"{self.name} keeps something else than what it was given as {sha256}: its SHA-256 "
                f"is {actual}. Nothing refers to it; push again, and see to the bucket",
                reason="BLOB_DAMAGED",
                sha256=sha256,
            )

    def _is_whole(self, sha256: str, size: int) -> bool:
        try:
            return self._size(sha256) == size and self.rehash(sha256) == sha256
        except FileNotFoundError:
            return False

    def _put_parts(self, file: Path, size: int, key: str) -> None:
        part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
        upload, there = self._begun(key)
        if not upload:
            upload = self._call("create_multipart_upload", Key=key)["UploadId"]
        parts: list[dict[str, Any]] = []
        with file.open("rb", buffering=0) as source:
            while body := _read_full(source, part_bytes):
                number = len(parts) + 1
                md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
                etag = there.get(number, "")
                # Of a part the ETag is its MD5, unless the bucket encrypts with keys of its own:
                # then it is sent again.
                if etag.strip('"') != md5:
                    etag = self._call(
                        "upload_part", Key=key, UploadId=upload, PartNumber=number, Body=body
                    )["ETag"]
                parts.append({"PartNumber": number, "ETag": etag})
        try:
            self._call(
                "complete_multipart_upload",
                Key=key,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
            )
        except FileNotFoundError:
            # Another manager, or an attempt whose answer was lost, has ended it with the same
            # parts; reading it back tells.
            _log.warning("an upload to S3 had ended already", key=key)

    def _begun(self, key: str) -> tuple[str, dict[int, str]]:
        """Return an upload of the key that was begun and not completed, and its parts' ETags."""
        page = self._call("list_multipart_uploads", Prefix=key)
        begun = [upload for upload in page.get("Uploads", ()) if upload["Key"] == key]
        if not begun:
            return "", {}
        upload = max(begun, key=lambda each: each["Initiated"])["UploadId"]
        there: dict[int, str] = {}
        more: dict[str, int] = {}
        try:
            while True:
                page = self._call("list_parts", Key=key, UploadId=upload, **more)
                there |= {part["PartNumber"]: part["ETag"] for part in page.get("Parts", ())}
                if not page.get("IsTruncated"):
                    return upload, there
                more = {"PartNumberMarker": page["NextPartNumberMarker"]}
        except FileNotFoundError:
            return "", {}

    def pieces(
        self, sha256: str, size: Callable[[], int] = lambda: PIECE_BYTES
    ) -> Generator[bytes, None, None]:
        """Read range by range, so that one that fails is read again by itself."""
        total, start = self._size(sha256), 0
        while start < total:
            piece_bytes = size()
            end = min(start + _RANGE_PIECES * piece_bytes, total)
            content = self._get(self._key(sha256), f"bytes={start}-{end - 1}", end - start)
            for offset in range(0, len(content), piece_bytes):
                yield content[offset : offset + piece_bytes]
            start = end

    def urls(self, sha256s: Sequence[str]) -> dict[str, BlobUrl]:
        """Sign URLs, if that was asked for; S3 itself is not asked anything."""
        if self._signer is None:
            return {}
        try:
            return self._signer.sign({sha256: self._key(sha256) for sha256 in sha256s})
        # Keys are looked for in many places, which fail in many ways.
        except Exception as error:
            _log.warning("no URLs can be signed; files go through the manager", error=repr(error))
            return {}

    def _get(self, key: str, part: str, size: int | None = None) -> bytes:
        async def read() -> bytes:
            ranged = {"Range": part} if part else {}
            answer = await self._files._call_s3(
                "get_object", Bucket=self._bucket, Key=key, **ranged
            )
            async with answer["Body"] as body:
                content: bytes = await body.read()
            if size is not None and len(content) != size:
                raise ConnectionError(f"{len(content)} bytes came instead of {size}")
            return content

        return self._until_it_works("get_object", read)

    def _size(self, sha256: str) -> int:
        return int(self._call("head_object", Key=self._key(sha256))["ContentLength"])

    def __iter__(self) -> Iterator[str]:
        """Yield what lies below ``sha256``, page by page."""
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Prefix=f"{self._prefix}sha256/", **more)
            for entry in page.get("Contents", ()):
                if digest := blob_of(entry["Key"]):
                    yield digest
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, sha256: str) -> None:
        """Delete the object, with a single try: what is left is collected the next time."""
        request = {"Key": self._key(sha256)}
        self._until_it_works("delete_object", lambda: self._request("delete_object", request), 0)

    def remove_leftovers(self, older_than: float) -> None:
        """Give up multipart uploads that nobody completed: they are stored, and paid for."""
        more: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", Prefix=f"{self._prefix}sha256/", **more)
            for upload in page.get("Uploads", ()):
                if upload["Initiated"].timestamp() < older_than:
                    with contextlib.suppress(FileNotFoundError):
                        self._call(
                            "abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"]
                        )
            if not page.get("IsTruncated"):
                return
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _key(self, sha256: str) -> str:
        return self._prefix + blob_path(sha256)

    @contextlib.contextmanager
    def _for_writing(self) -> Iterator[None]:
        """Make a refusal final: a bucket that can only be read stays so for all attempts."""
        try:
            yield
        except Unavailable as error:
            if error.reason != "BLOB_STORE_FORBIDDEN":
                raise
            raise FailedPrecondition(
                f"{error.message}; nothing was stored", reason=error.reason, store=self.name
            ) from error

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._until_it_works(method, lambda: self._request(method, arguments))

    def _request(self, method: str, arguments: dict[str, Any]) -> Awaitable[Any]:
        request: Awaitable[Any] = self._files._call_s3(method, Bucket=self._bucket, **arguments)
        return request

    def _until_it_works(
        self, method: str, request: Callable[[], Awaitable[T]], seconds: float | None = None
    ) -> T:
        """Make a request again until it succeeds, fails for good, or the time is over."""
        give_up = time.monotonic() + (self._retry_seconds if seconds is None else seconds)
        pause = _FIRST_PAUSE_SECONDS

        async def attempt() -> T:
            return await asyncio.wait_for(request(), self._request_seconds)

        while True:
            try:
                answer: T = fsspec.asyn.sync(self._files.loop, attempt)
                return answer
            except FileNotFoundError as error:
                # Whether the object is missing or the bucket is another matter altogether.
                if method != "list_objects_v2" and _code(error) != "NoSuchBucket":
                    if _code(error) == "404":
                        self._call("list_objects_v2", Prefix=self._prefix, MaxKeys=1)
                    raise
                raise Unavailable(
                    f"there is no bucket {self._bucket!r} ({self.name}); create it, or restore it "
                    "if it was deleted",
                    reason="BLOB_STORE_MISSING",
                    store=self.name,
                ) from error
            except (PermissionError, NoCredentialsError) as error:
                raise Unavailable(
                    f"{self.name} refuses access ({method}: {error}); see to the keys "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile) and to the policy "
                    "of the bucket",
                    reason="BLOB_STORE_FORBIDDEN",
                    store=self.name,
                ) from error
            # S3, its libraries and the network fail in many ways, which have no class in common.
            except Exception as error:
                if time.monotonic() + pause >= give_up:
                    raise Unavailable(
                        f"{self.name} does not answer as it should ({method}: "
                        f"{error or type(error).__name__}); nothing was lost. Try again later",
                        reason="BLOB_STORE_UNAVAILABLE",
                        store=self.name,
                    ) from error
                _log.warning(
                    "S3 failed; trying again", method=method, error=repr(error), pause=pause
                )
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)


def _code(error: BaseException) -> str:
    """Return the code that S3 gave an error."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _read_full(source: Any, size: int) -> bytes:
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size and (count := source.readinto(view[done:])):
        done += count
    return bytes(view[:done])
