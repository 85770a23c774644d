"""What onnxruntime's errors say of the GPU: full, gone, or just this request's fault."""

from __future__ import annotations

import re
import threading

from pollard.runtime.errors import DeviceFault, DeviceLost, DeviceMemoryShort

_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|BFCArena|Available memory of \d+ is smaller"
    r"|(?:CUDNN|CUBLAS)_STATUS_ALLOC_FAILED|CUDA failure 2:",
    re.IGNORECASE,
)
_CUDA = re.compile(r"CUDA (?:failure|error):? (\d+)", re.IGNORECASE)
_LIBRARY = re.compile(r"(?:CUDNN|CUBLAS|CUFFT|CURAND) (?:failure|error)", re.IGNORECASE)

_HARMLESS = frozenset({1, 2, 3, 98, 200, 201, 209, 215, 218, 219, 222, 701, 801, *range(900, 911)})
"""Codes after which CUDA goes on: of arguments, memory, images of kernels and captures. Every other
one sticks to the process."""


class DeviceState:
    """Whether a GPU can still be used by this process. May be used on any thread."""

    def __init__(self, index: int) -> None:
        """Start with a GPU that works.

        Args:
            index: Of the GPU.
        """
        self.index = index
        self.lost = ""
        """Why it cannot be used any more; empty while it can."""

    def lose(self, reason: str) -> None:
        """Note that it cannot be used any more; the first reason stays."""
        self.lost = self.lost or reason

    def check(self) -> None:
        """Check that it has not been lost.

        Raises:
            DeviceLost: it has.
        """
        if self.lost:
            raise DeviceLost(
                f"GPU {self.index} cannot be used by this process any more: {self.lost}; look at "
                "the kernel's log (dmesg, Xid) and start the server again",
                device=self.index,
            )


_states: dict[int, DeviceState] = {}
_lock = threading.Lock()


def state_of(index: int) -> DeviceState:
    """Return the state of a GPU, which all its sessions share."""
    with _lock:
        return _states.setdefault(index, DeviceState(index))


def explain(error: Exception, state: DeviceState) -> Exception:
    """Return what an error of a run or of a load was about; the error itself if not the GPU.

    A GPU that is lost is noted in its state.
    """
    if isinstance(error, DeviceFault) and type(error) is not DeviceFault:
        return error
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if _MEMORY.search(text):
        return DeviceMemoryShort(
            f"GPU {state.index} has not enough free memory: {first}", device=state.index
        )
    code = _CUDA.search(text)
    if code is not None and int(code[1]) not in _HARMLESS:
        state.lose(first)
        return DeviceLost(
            f"GPU {state.index} cannot be used by this process any more: {first}; start the server "
            "again",
            device=state.index,
        )
    if code is not None or _LIBRARY.search(text):
        return DeviceFault(f"GPU {state.index} failed: {first}", device=state.index)
    return error
