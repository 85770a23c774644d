"""CUDA on this machine: what there is, what is missing, and how runs on it are set up.

Importing this module costs nothing and touches no GPU. Everything goes through `ctypes`, so that
no package beside onnxruntime-gpu and CUDA's libraries is needed.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pollard.runtime.errors import DeviceFault, ProviderMissing

ConvSearch = Literal["HEURISTIC", "EXHAUSTIVE", "DEFAULT"]

DRIVER = "libcuda.so.1"
"""The driver's library."""

_DRIVER_FOR = {12: "525", 13: "580"}
"""Oldest driver of each CUDA version."""

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class CudaOptions:
    """How a model is run on the GPU."""

    device_id: int = 0
    """As CUDA counts them, from 0; `CUDA_VISIBLE_DEVICES` hides and reorders GPUs."""
    instances: int = 1
    """Sessions, each with a CUDA stream and buffers of its own."""
    devices: tuple[int, ...] = ()
    """GPU of each instance; empty puts all on `device_id`."""
    memory_limit_bytes: int = 0
    """Most GPU memory for weights and activations of all instances together; 0 for no limit."""
    prefer_nhwc: bool = True
    """Run convolutions with the channels last, the layout of tensor cores."""
    conv_search: ConvSearch = "HEURISTIC"
    """How cuDNN's algorithms are chosen; EXHAUSTIVE times all of them for each new shape."""
    tf32: bool = True
    """Let float32 products be rounded to 10 bits of mantissa, which is several times faster."""
    graphs: bool = False
    """Replay CUDA graphs, one for each size of a batch, in place of starting kernel by kernel."""

    @property
    def placed(self) -> tuple[int, ...]:
        """The GPU of each instance."""
        return self.devices or (self.device_id,) * max(1, self.instances)

    def provider_options(self, device_id: int) -> dict[str, str]:
        """Return the options of onnxruntime's CUDA provider for one instance."""
        options = {
            "device_id": str(device_id),
            # Powers of two would take up to twice what is needed, beside another revision.
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": self.conv_search,
            "prefer_nhwc": "1" if self.prefer_nhwc else "0",
            "use_tf32": "1" if self.tf32 else "0",
        }
        if self.memory_limit_bytes:
            options["gpu_mem_limit"] = str(self.memory_limit_bytes // len(self.placed))
        if self.graphs:
            options["enable_cuda_graph"] = "1"
        return options


@dataclass(frozen=True)
class Device:
    """One GPU."""

    index: int
    name: str
    total_bytes: int
    """Its memory."""


@dataclass(frozen=True)
class Facts:
    """What was found of CUDA on this machine."""

    onnxruntime: str
    """Its version; empty if it is not installed."""
    providers: tuple[str, ...]
    """That onnxruntime was built with, whether they can be used or not."""
    cuda_version: str
    """CUDA that onnxruntime was built for, such as "13.0"; empty if for none."""
    driver: str = ""
    """Version of the driver, such as "580.159.04"; empty if unknown."""
    driver_cuda: int = 0
    """CUDA that the driver supports, 13000 for 13.0; 0 if there is no driver."""
    driver_problem: str = ""
    """Why the driver cannot be used; empty if it can."""
    missing: tuple[str, ...] = ()
    """Libraries that were not found, by file name."""
    devices: tuple[Device, ...] = ()


def look() -> Facts:
    """Look at this machine; loads CUDA's libraries, which takes a second where they are."""
    try:
        import onnxruntime
    except ImportError:
        return Facts("", (), "")
    cuda_version = str(getattr(onnxruntime, "cuda_version", "") or "")
    providers = tuple(onnxruntime.get_available_providers())
    driver_cuda, problem, devices = _look_at_driver()
    missing: tuple[str, ...] = ()
    if "CUDAExecutionProvider" in providers:
        missing = preload(cuda_version)
    return Facts(
        onnxruntime.__version__,
        providers,
        cuda_version,
        _driver_version(),
        driver_cuda,
        problem,
        missing,
        devices,
    )


@functools.cache
def _looked() -> Facts:
    return look()


def problems(device_id: int = 0, facts: Facts | None = None) -> list[str]:
    """Return why GPU `device_id` cannot be used, and what helps; empty if it can be.

    Args:
        device_id: The GPU.
        facts: What was found; None looks, once in the life of the process.
    """
    facts = facts or _looked()
    if not facts.onnxruntime:
        return ["onnxruntime is not installed; install pollard-runtime[gpu]"]
    if "CUDAExecutionProvider" not in facts.providers:
        return [
            f"this onnxruntime {facts.onnxruntime} has no CUDAExecutionProvider; uninstall "
            "onnxruntime and install onnxruntime-gpu (pollard-runtime[gpu]), never both"
        ]
    major = _major(facts.cuda_version)
    found: list[str] = []
    if not facts.driver_cuda:
        found.append(
            f"there is no usable NVIDIA driver: {facts.driver_problem}; install driver "
            f"{_DRIVER_FOR.get(major, '580')} or newer, and in a container pass the GPU in"
        )
    elif major and facts.driver_cuda // 1000 < major:
        found.append(
            f"the NVIDIA driver {facts.driver or ''} is too old: it supports CUDA "
            f"{facts.driver_cuda // 1000}.{facts.driver_cuda % 1000 // 10}, and onnxruntime "
            f"{facts.onnxruntime} was built for CUDA {facts.cuda_version}; install driver "
            f"{_DRIVER_FOR.get(major, 'for it')} or newer"
        )
    elif facts.driver_problem:
        found.append(f"the NVIDIA driver cannot be used: {facts.driver_problem}")
    if facts.missing:
        found.append(
            f"the libraries {', '.join(facts.missing)} were not found; install "
            f"{' '.join(packages_of(facts.missing, major))}, or put their folder into "
            "LD_LIBRARY_PATH"
        )
    if not found and not facts.devices:
        found.append(
            "the driver shows no GPU; look at nvidia-smi and at CUDA_VISIBLE_DEVICES "
            "(an empty value hides all)"
        )
    if not found and not 0 <= device_id < len(facts.devices):
        there = ", ".join(f"{each.index} ({each.name})" for each in facts.devices)
        found.append(
            f"there is no GPU {device_id}; there {_are(len(facts.devices))} {there}, counted from 0"
        )
    return found


def require(device_id: int = 0, provider: str = "CUDAExecutionProvider") -> None:
    """Check that a GPU can be used.

    Raises:
        ProviderMissing: it cannot; the message names what is missing.
    """
    found = problems(device_id)
    if not found and provider.startswith("Tensorrt"):
        found = tensorrt_problems()
    if found:
        raise ProviderMissing(
            f"{provider} cannot be used: {'; '.join(found)}", provider=provider, device=device_id
        )


def tensorrt_problems(facts: Facts | None = None) -> list[str]:
    """Return why TensorRT cannot be used where CUDA can; empty if it can be."""
    facts = facts or _looked()
    if "TensorrtExecutionProvider" not in facts.providers:
        return [f"this onnxruntime {facts.onnxruntime} was built without TensorRT"]
    if _load("libnvinfer.so.10") is None:
        return ["the library libnvinfer.so.10 was not found; install tensorrt-cu13 10"]
    return []


def devices() -> tuple[Device, ...]:
    """Return the GPUs that CUDA shows."""
    return _looked().devices


def memory(device_id: int = 0) -> tuple[int, int]:
    """Return the free and the total memory of a GPU in bytes.

    Raises:
        DeviceFault: CUDA cannot tell.
    """
    runtime = Runtime.get()
    runtime.call("cudaSetDevice", device_id)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    runtime.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def libraries(cuda_version: str) -> tuple[str, ...]:
    """Return the file names that onnxruntime's CUDA provider loads, in the order of loading."""
    major = _major(cuda_version) or 13
    return (
        f"libcublasLt.so.{major}",
        f"libcublas.so.{major}",
        "libcurand.so.10",
        f"libcudart.so.{major}",
        "libcudnn.so.9",
    )


def preload(cuda_version: str) -> tuple[str, ...]:
    """Load CUDA's libraries from the packages nvidia-*, from torch, or from the system.

    onnxruntime finds by name what is loaded already, wherever it lies.

    Returns:
        Those that were not found.
    """
    return tuple(name for name in libraries(cuda_version) if _load(name) is None)


def packages_of(missing: Sequence[str], major: int) -> list[str]:
    """Return the PyPI packages that hold libraries, so that they can be installed."""
    suffix = f"-cu{major}" if major < 13 else ""
    names = {
        "libcublas": f"nvidia-cublas{suffix}",
        "libcublasLt": f"nvidia-cublas{suffix}",
        "libcurand": f"nvidia-curand{suffix}",
        "libcudart": f"nvidia-cuda-runtime{suffix}",
        "libcudnn": f"nvidia-cudnn-cu{major}",
    }
    return sorted({names[each.split(".")[0]] for each in missing if each.split(".")[0] in names})


class Runtime:
    """The functions of libcudart that Pollard calls. They release the GIL."""

    _lock = threading.Lock()
    _only: Runtime | None = None

    def __init__(self, library: Any) -> None:
        """Take the loaded library."""
        self._library = library
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, arguments in {
            "cudaSetDevice": [ctypes.c_int],
            "cudaMemGetInfo": [pointer, pointer],
            "cudaHostAlloc": [pointer, size, ctypes.c_uint],
            "cudaFreeHost": [pointer],
            "cudaMalloc": [pointer, size],
            "cudaFree": [pointer],
            "cudaMemcpy": [pointer, pointer, size, ctypes.c_int],
            "cudaDeviceSynchronize": [],
            "cudaThreadExchangeStreamCaptureMode": [pointer],
            "cudaIpcGetMemHandle": [pointer, pointer],
            "cudaIpcOpenMemHandle": [pointer, IpcHandle, ctypes.c_uint],
            "cudaIpcCloseMemHandle": [pointer],
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        library.cudaGetErrorString.argtypes = [ctypes.c_int]
        library.cudaGetErrorString.restype = ctypes.c_char_p
        # The same functions, called without letting go of the GIL.
        self._holding = ctypes.PyDLL(None, handle=library._handle)

    @classmethod
    def get(cls) -> Runtime:
        """Return it, loaded once.

        Raises:
            ProviderMissing: libcudart is not there.
        """
        with cls._lock:
            if cls._only is None:
                name = next(n for n in libraries(_looked().cuda_version) if "cudart" in n)
                library = _load(name)
                if library is None:
                    raise ProviderMissing(f"{name} was not found", library=name)
                cls._only = cls(library)
            return cls._only

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            DeviceFault: it failed; the message is CUDA's.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            # A code that does not stick would be reported by the next call of this thread again.
            self._library.cudaGetLastError()
            words = self._library.cudaGetErrorString(code).decode()
            raise DeviceFault(f"{name}: CUDA failure {code}: {words}", code=code)

    def use(self, device_id: int) -> None:
        """Make a GPU that is in use already this thread's.

        Keeps the GIL: that takes a microsecond, and to get the GIL back can take a hundred.

        Raises:
            DeviceFault: it failed; the message is CUDA's.
        """
        if self._holding.cudaSetDevice(device_id):
            self.call("cudaSetDevice", device_id)


class IpcHandle(ctypes.Structure):
    """`cudaIpcMemHandle_t`: names memory of a GPU in another process."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
"""Of cudaMemcpy."""

CAPTURE_MODE_THREAD_LOCAL = 1
"""cudaStreamCaptureModeThreadLocal."""


def _look_at_driver() -> tuple[int, str, tuple[Device, ...]]:
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0, f"{DRIVER} was not found", ()
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    code = driver.cuInit(0)
    if code == 100:
        return version.value, "", ()
    if code:
        return version.value, f"cuInit failed with {code} ({_driver_words(driver, code)})", ()
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = []
    for index in range(count.value):
        device, size = ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        found.append(Device(index, name.value.decode(errors="replace"), size.value))
    return version.value, "", tuple(found)


def _driver_words(driver: Any, code: int) -> str:
    words = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(words))
    return words.value.decode() if words.value else "unknown"


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else ""


def _load(name: str) -> Any:
    """Load a library by name; None if it is nowhere."""
    for folder in sys.path:
        root = Path(folder or ".")
        for path in (*sorted(root.glob(f"nvidia/*/lib/{name}")), root / "torch" / "lib" / name):
            if path.exists():
                try:
                    return ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
                except OSError:
                    continue
    try:
        return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:
        return None


def _major(version: str) -> int:
    first = version.split(".")[0]
    return int(first) if first.isdigit() else 0


def _are(count: int) -> str:
    return "is only" if count == 1 else "are"
