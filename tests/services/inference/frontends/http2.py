"""HTTP/2 as no library would speak it: frames made by hand (RFC 9113, RFC 7541)."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INFER = "/inference.GRPCInferenceService/ModelInfer"


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """Return a frame."""
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def literal(name: str, value: bytes) -> bytes:
    """Return a field that no table keeps, without Huffman's code."""
    return b"\x10" + _string(name.encode()) + _string(value)


def _string(content: bytes) -> bytes:
    length, made = len(content), bytearray()
    if length < 127:
        made.append(length)
    else:
        made.append(127)
        length -= 127
        while length >= 128:
            made.append(length % 128 + 128)
            length //= 128
        made.append(length)
    return bytes(made) + content


def call_headers(path: str = INFER, **more: bytes) -> bytes:
    """Return the fields with which a call begins, and more of them (``_`` stands for ``-``)."""
    fields = {
        ":method": b"POST",
        ":scheme": b"http",
        ":path": path.encode(),
        ":authority": b"localhost",
        "te": b"trailers",
        "content-type": b"application/grpc",
    }
    fields |= {name.replace("_", "-"): value for name, value in more.items()}
    return b"".join(literal(name, value) for name, value in fields.items())


class Connection:
    """A connection on which anything can be sent."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def greet(self) -> None:
        """Send what every client says first."""
        self.send(PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0))

    def send(self, content: bytes) -> bool:
        """Send; False when the server has closed the connection."""
        try:
            self._socket.sendall(content)
        except ConnectionError:
            return False
        return True

    def wait_closed(self) -> bytes:
        """Read until the server closes the connection, and return what it said."""
        said = bytearray()
        with contextlib.suppress(ConnectionError):
            while got := self._socket.recv(1 << 16):
                said += got
        return bytes(said)

    def answer(self, stream: int) -> bytes:
        """Return all frames of a stream but its type, flags and number, up to its end."""
        said, found = bytearray(), bytearray()
        while True:
            while len(said) >= 9 and len(said) >= (size := int.from_bytes(said[:3], "big")) + 9:
                kind, flags = said[3], said[4]
                content, number = bytes(said[9 : 9 + size]), int.from_bytes(said[5:9], "big")
                del said[: 9 + size]
                if kind == PING and not flags & ACK:
                    self.send(frame(PING, ACK, 0, content))
                if number == stream:
                    found += content
                    if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                        return bytes(found)
            got = self._socket.recv(1 << 16)
            if not got:
                return bytes(found)
            said += got
