"""Files straight from where the manager keeps them, by URLs that it gave.

A URL lets in whoever knows it, so none of it but scheme, host and port is ever logged or put into
an error. Nothing but that URL is asked: no redirection is followed, no proxy used. What comes is
not trusted: the last piece of a file is handed on only when its length and digest are right.

A connection that breaks or stalls is opened again for what is missing. Reading is done in threads:
the event loop that answers requests must not decrypt a bundle.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PIECE_BYTES = 1024 * 1024
"""Size of the pieces that are handed on."""

_AT_ONCE = 4
"""Files that a server fetches at the same time; the others wait."""

_ERROR_BYTES = 4096
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")

Take = Callable[[int, bytes], None]
"""Called in a thread with each piece and where it begins in the file, in order."""


@dataclass
class RemoteFile:
    """A file that lies elsewhere, and how far it has been fetched."""

    path: str
    """Its path within the bundle."""
    size_bytes: int
    sha256: str
    url: str = field(repr=False)
    received: int = 0
    """Bytes that were handed on."""
    digest: Any = field(default_factory=hashlib.sha256, repr=False)
    """Of them."""

    def begin_anew(self) -> None:
        """Forget what was fetched."""
        self.received, self.digest = 0, hashlib.sha256()

    @property
    def place(self) -> str:
        """Scheme, host and port of the URL, which may be told."""
        try:
            parts = urlsplit(self.url)
            host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            return "a URL that cannot be read"
        return f"{parts.scheme}://{host}{port}"


class DirectFetchFailed(Exception):
    """A file could not be had by its URL; the manager has it still."""

    def __init__(self, message: str, *, refused: bool = False, unreachable: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.refused = refused
        """The URL does not let in, perhaps because its time is over."""
        self.unreachable = unreachable
        """No connection could be had: other URLs there will do no better."""


class _Broken(Exception):
    """A connection ended early, or stalled; the message is for people."""


class _NotTaken(Exception):
    """Who gets the pieces has failed, which no other connection can help."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


@dataclass(frozen=True)
class FetchLimits:
    """How patient a fetch is."""

    connect_seconds: float = 5.0
    piece_seconds: float = 20.0
    """Longest time for a piece: what is slower is as good as away."""
    attempts: int = 3
    """Connections in a row that bring no whole piece."""
    pause_seconds: float = 0.5
    """Before the second connection; it doubles with each."""


class DirectFetch:
    """Fetches files by URLs. Belongs to one event loop."""

    def __init__(self, limits: FetchLimits | None = None) -> None:
        self.limits = limits or FetchLimits()
        self._threads: ThreadPoolExecutor | None = None
        self._tls: ssl.SSLContext | None = None

    async def fetch(self, file: RemoteFile, take: Take) -> None:
        """Fetch what is missing of a file and hand it on.

        After a cancellation nothing is handed on any more.

        Raises:
            DirectFetchFailed: it could not be had, or is not what it should be. What was handed on
                before may be wrong; `file.received` says how much that is.
            Exception: what `take` raises.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="bundle-fetch")
        one = _Fetch(self, file, take)
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, one.run)
        finally:
            one.cancel()

    def close(self) -> None:
        """Take no more files."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def tls(self) -> ssl.SSLContext:
        """Return what the machine trusts."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


class _Fetch:
    """One file, in a thread."""

    def __init__(self, owner: DirectFetch, file: RemoteFile, take: Take) -> None:
        self._owner = owner
        self._limits = owner.limits
        self._file = file
        self._take = take
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._connection: http.client.HTTPConnection | None = None

    def cancel(self) -> None:
        """Hand nothing on any more; the thread ends soon."""
        with self._lock:
            self._cancelled.set()
            connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                connection.sock.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Fetch the file, with as many connections as it takes."""
        file, failures = self._file, 0
        while True:
            before = file.received
            try:
                self._once()
                return
            except _Broken as error:
                failures = 1 if file.received > before else failures + 1
                if failures >= self._limits.attempts:
                    raise DirectFetchFailed(f"{file.place} {error}") from None
            if self._cancelled.wait(self._limits.pause_seconds * 2 ** (failures - 1)):
                raise DirectFetchFailed("the fetch was cancelled")

    def _once(self) -> None:
        connection = self._open()
        try:
            with self._lock:
                if self._cancelled.is_set():
                    raise DirectFetchFailed("the fetch was cancelled")
                self._connection = connection
            try:
                # Closed here: a response that ends its connection has the socket to itself.
                with contextlib.closing(self._ask(connection)) as response:
                    self._accept(response)
                    self._read(response)
            except _NotTaken as failed:
                raise failed.error from None
            except TimeoutError:
                raise _Broken(f"sent nothing for {self._limits.piece_seconds:g} s") from None
            except (OSError, http.client.HTTPException):
                # Their words may hold the URL.
                raise _Broken("broke off") from None
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def _open(self) -> http.client.HTTPConnection:
        try:
            parts = urlsplit(self._file.url)
            port = parts.port
        except ValueError:
            raise DirectFetchFailed("the manager gave a URL that cannot be read") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise DirectFetchFailed("the manager gave what is no http or https URL")
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                parts.hostname,
                port,
                timeout=self._limits.connect_seconds,
                context=self._owner.tls(),
            )
        else:
            connection = http.client.HTTPConnection(
                parts.hostname, port, timeout=self._limits.connect_seconds
            )
        try:
            connection.connect()
        except (OSError, ValueError) as error:
            connection.close()
            why = getattr(error, "strerror", None) or type(error).__name__
            raise DirectFetchFailed(
                f"{self._file.place} cannot be reached: {why}", unreachable=True
            ) from None
        connection.sock.settimeout(self._limits.piece_seconds)
        return connection

    def _ask(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        file = self._file
        parts = urlsplit(file.url)
        headers = {"User-Agent": "pollard", "Accept-Encoding": "identity"}
        if file.received:
            headers["Range"] = f"bytes={file.received}-"
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        return connection.getresponse()

    def _accept(self, response: http.client.HTTPResponse) -> None:
        file = self._file
        if response.status == (206 if file.received else 200):
            self._check_length(response)
            return
        words = f"{file.place} answered {response.status}"
        if code := _CODE.search(response.read(_ERROR_BYTES)):
            words += f" ({code[1].decode()})"
        if response.status >= 500 or response.status == 429:
            raise _Broken(words.removeprefix(f"{file.place} "))
        raise DirectFetchFailed(words, refused=response.status in (400, 401, 403))

    def _check_length(self, response: http.client.HTTPResponse) -> None:
        file = self._file
        due = file.size_bytes - file.received
        told = response.headers.get("Content-Length")
        part = response.headers.get("Content-Range", "")
        if (told is not None and told != str(due)) or (
            file.received and not part.startswith(f"bytes {file.received}-")
        ):
            raise DirectFetchFailed(
                f"{file.place} has something else: {told or 'no'} bytes where {due} are missing"
            )

    def _read(self, response: http.client.HTTPResponse) -> None:
        file = self._file
        while file.received < file.size_bytes:
            due = min(PIECE_BYTES, file.size_bytes - file.received)
            piece = self._piece(response, due)
            file.digest.update(piece)
            actual = file.digest.hexdigest() if file.received + due == file.size_bytes else ""
            if actual and actual != file.sha256:
                raise DirectFetchFailed(
                    f"{file.place} has something else: its SHA-256 is {actual}, not {file.sha256}"
                )
            with self._lock:
                if self._cancelled.is_set():
                    raise DirectFetchFailed("the fetch was cancelled")
                try:
                    self._take(file.received, piece)
                except Exception as error:
                    raise _NotTaken(error) from error
                file.received += due

    def _piece(self, response: http.client.HTTPResponse, due: int) -> bytes:
        give_up = time.monotonic() + self._limits.piece_seconds
        piece, file_bytes = bytearray(), self._file.received
        while len(piece) < due:
            # One read of the socket, so that drops that never end are noticed, too.
            content = response.read1(due - len(piece))
            if not content:
                raise _Broken(f"ended after {file_bytes + len(piece)} bytes")
            piece += content
            if len(piece) < due and time.monotonic() > give_up:
                raise _Broken(
                    f"sent only {len(piece)} bytes within {self._limits.piece_seconds:g} s"
                )
        return bytes(piece)
