"""One decode worker: a process that turns images into tensors, one after the other.

Started by `decode_pool` as ``python -m pollard.services.preprocess.worker``. It
imports no gRPC and no onnxruntime, holds no secrets, and ends when its parent
does. The frames on its socket:

- to the worker: length of the steps (4 bytes) and of the image (8 bytes), both
  big-endian; the steps, a serialised Manifest that holds nothing else; the image;
- from the worker: length of a JSON object (4 bytes) and of the tensor (8 bytes);
  the object; the tensor. JSON, not pickle: a decoder that an image took over
  must not be able to run code in the parent.

Frames are answered in the order in which they come; the next one may be sent before
the answer, and then waits in the socket.

The first frame from a worker is empty and says that it is ready.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import resource
import signal
import socket
import struct
import sys
import warnings

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import ImageTooLarge, RuntimeFault
from pollard.runtime.images import ImageLimits
from pollard.runtime.transforms import Pipeline

HEADER = struct.Struct("!IQ")


@dataclasses.dataclass(frozen=True)
class WorkerLimits:
    """What one worker may use."""

    max_image_bytes: int = 32 * 1024**2
    """Largest encoded image, in bytes."""
    max_image_pixels: int = 36_000_000
    """Most pixels of an image."""
    max_pixels_per_byte: int = 10_000
    """Most pixels for each byte of an encoded image, beyond one megapixel."""
    timeout_seconds: float = 10.0
    """Longest time for one image; the worker is killed afterwards."""
    memory_bytes: int = 2 * 1024**3
    """Largest address space, in bytes."""

    @property
    def image_limits(self) -> ImageLimits:
        """The part that the pipeline itself checks."""
        return ImageLimits(self.max_image_bytes, self.max_image_pixels, self.max_pixels_per_byte)


def main() -> None:
    """Serve the socket whose descriptor is the first argument until it closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    limits = WorkerLimits(**json.loads(sys.argv[2]))
    # Whoever started the service may allow it less.
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    if allowed == resource.RLIM_INFINITY or allowed > limits.memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    # A core dump would hold a user's picture.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Pillow's warnings of damaged metadata are nobody's business here.
    warnings.simplefilter("ignore")
    with _Messages() as messages, contextlib.suppress(ConnectionError, EOFError):
        _serve(connection, limits, messages)


class _Messages:
    """Takes what libraries print of the images they read, such as libtiff of every bad tag.

    Strangers would otherwise write the operator's log. A pipe that nobody waits for holds 64 KiB;
    what comes beyond is lost, and an image can fill no memory with it.
    """

    def __enter__(self) -> _Messages:
        self._stderr = os.dup(2)
        self._end, other = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.dup2(other, 2)
        os.close(other)
        return self

    def __exit__(self, *_: object) -> None:
        # What Python itself has to say of its end is for the operator.
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        os.close(self._end)

    def taken(self) -> int:
        """Return the number of lines since the last call, and let them go."""
        lines = 0
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._end, 64 * 1024):
                lines += part.count(b"\n") or 1
        return lines


def _serve(connection: socket.socket, limits: WorkerLimits, messages: _Messages) -> None:
    pipelines = functools.lru_cache(maxsize=128)(functools.partial(_pipeline, limits))
    connection.sendall(HEADER.pack(0, 0))
    while True:
        steps_size, content_size = HEADER.unpack(_receive(connection, HEADER.size))
        steps = bytes(_receive(connection, steps_size))
        content = bytes(_receive(connection, content_size))
        # The parent kills a worker that hangs. Should the parent be gone, the
        # kernel does: no code of this process needs to run for that.
        signal.setitimer(signal.ITIMER_REAL, limits.timeout_seconds + 5)
        answer, tensor = _transform(pipelines, steps, content, limits)
        del content
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer["messages"] = messages.taken()
        head = json.dumps(answer).encode()
        connection.sendall(HEADER.pack(len(head), len(tensor)) + head)
        connection.sendall(tensor)
        del tensor


def _pipeline(limits: WorkerLimits, steps: bytes) -> Pipeline:
    return Pipeline(
        bundle_pb2.Manifest.FromString(steps).preprocess,
        limits.image_limits,
    )


def _transform(
    pipelines: functools._lru_cache_wrapper[Pipeline],
    steps: bytes,
    content: bytes,
    limits: WorkerLimits,
) -> tuple[dict[str, object], memoryview]:
    try:
        result = pipelines(steps).apply(content)
    except MemoryError:
        error: RuntimeFault = ImageTooLarge(
            f"the image needs more than {limits.memory_bytes} bytes of memory to decode",
            limit_bytes=limits.memory_bytes,
        )
    except RuntimeFault as fault:
        error = fault
    else:
        answer: dict[str, object] = {
            "dtype": result.array.dtype.str,
            "shape": result.array.shape,
            "geometry": dataclasses.asdict(result.geometry),
            "geometries": [dataclasses.asdict(geometry) for geometry in result.geometries],
        }
        return answer, result.array.data.cast("B")
    return (
        {"error": error.reason, "message": error.message, "metadata": error.metadata},
        memoryview(b""),
    )


def _receive(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise EOFError
        view = view[received:]
    return buffer


if __name__ == "__main__":
    main()
