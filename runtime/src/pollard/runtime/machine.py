"""What this machine can run, and which variant of a bundle suits it best."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import RequirementsNotMet

# Provider that a target needs.
PROVIDERS = {
    "cpu-fp32": "CPUExecutionProvider",
    "cpu-int8": "CPUExecutionProvider",
    "cuda-fp16": "CUDAExecutionProvider",
    "tensorrt-int8": "TensorrtExecutionProvider",
}

_PROVIDER_NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Providers of GPUs by the name that users give them."""

# Either kind of VNNI gives the exact 8-bit products that an unreduced U8S8 model needs.
_EQUIVALENT_FEATURES = ({"avx512_vnni", "avx_vnni"},)


@dataclass(frozen=True)
class Machine:
    """What this machine offers."""

    execution_providers: tuple[str, ...]
    """onnxruntime's execution providers."""
    cpu_features: frozenset[str]
    """Processor features by their Linux flag."""
    processor: str
    """Processor, as the operating system names it."""
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    """Memory that this process may use, in bytes."""
    onnxruntime: str
    """onnxruntime's version."""

    @classmethod
    def detect(cls) -> Machine:
        """Look at this machine.

        Raises:
            RequirementsNotMet: onnxruntime is not installed.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise RequirementsNotMet(
                "onnxruntime is not installed; install pollard-runtime[cpu] for processors or "
                "pollard-runtime[gpu] for CUDA, never both"
            ) from error
        features, processor = _read_cpuinfo()
        return cls(
            execution_providers=tuple(onnxruntime.get_available_providers()),
            cpu_features=features,
            processor=processor,
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=min(psutil.virtual_memory().total, _cgroup_limit()),
            onnxruntime=onnxruntime.__version__,
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that this machine can run in principle."""
        return tuple(
            target for target, provider in PROVIDERS.items() if provider in self.execution_providers
        )

    @property
    def has_vnni(self) -> bool:
        """Whether 8-bit dot products are exact and fast."""
        return self.offers("avx512_vnni")

    def without(self, features: Collection[str]) -> Machine:
        """Return this machine as if it lacked processor features, and those equivalent to them."""
        gone = set(features)
        for group in _EQUIVALENT_FEATURES:
            if gone & group:
                gone |= group
        return replace(self, cpu_features=self.cpu_features - gone)

    def with_provider(self, provider: str, device_id: int = 0) -> Machine:
        """Return this machine with only the providers that are wanted and can be used.

        onnxruntime names what it was built with, also where there is no GPU. Nothing is looked at
        where it was built for processors alone.

        Args:
            provider: "auto" for all that can be used, or "cpu", "cuda" or "tensorrt".
            device_id: The GPU.

        Raises:
            ProviderMissing: "cuda" or "tensorrt" cannot be used; the message says what is missing.
        """
        from pollard.runtime import cuda

        offered = self.execution_providers
        if provider == "cpu":
            return replace(self, execution_providers=_without_gpu(offered))
        if provider != "auto":
            wanted = _PROVIDER_NAMES[provider]
            cuda.require(device_id, wanted)
            # The processor is none in its place.
            return replace(self, execution_providers=(wanted,))
        if not any(name in offered for name in _PROVIDER_NAMES.values()):
            return self
        if cuda.problems(device_id):
            return replace(self, execution_providers=_without_gpu(offered))
        if _PROVIDER_NAMES["tensorrt"] in offered and cuda.tensorrt_problems():
            kept = tuple(name for name in offered if name != _PROVIDER_NAMES["tensorrt"])
            return replace(self, execution_providers=kept)
        return self

    def offers(self, feature: str) -> bool:
        """Tell whether the processor has ``feature`` or an equivalent one."""
        for group in _EQUIVALENT_FEATURES:
            if feature in group:
                return bool(group & self.cpu_features)
        return feature in self.cpu_features

    def why_not(self, variant: bundle_pb2.Variant) -> str | None:
        """Return why this machine cannot run ``variant``, or None when it can."""
        needs = variant.requirements
        provider = needs.execution_provider or PROVIDERS.get(variant.target, "")
        if provider not in self.execution_providers:
            return (
                f"it needs {provider or 'an unknown provider'}, and onnxruntime "
                f"{self.onnxruntime} here offers {', '.join(self.execution_providers)}"
            )
        missing = [name for name in needs.cpu_features if not self.offers(name)]
        if missing:
            return f"it needs the processor features {', '.join(missing)}"
        if needs.min_onnxruntime and _version(self.onnxruntime) < _version(needs.min_onnxruntime):
            return f"it needs onnxruntime {needs.min_onnxruntime}, here is {self.onnxruntime}"
        if needs.memory_bytes > self.memory_bytes:
            return f"it needs {needs.memory_bytes} bytes of memory, here are {self.memory_bytes}"
        return None


def select_variant(manifest: bundle_pb2.Manifest, machine: Machine) -> bundle_pb2.Variant:
    """Return the best variant that ``machine`` can run.

    Accelerated targets come before the processor's; among equals the
    manifest's order decides, in which the bundle's maker put the fastest first.

    Raises:
        RequirementsNotMet: it can run none; the message says why for each.
    """
    reasons: list[str] = []
    runnable: list[bundle_pb2.Variant] = []
    for variant in manifest.variants:
        why = machine.why_not(variant)
        if why is None:
            runnable.append(variant)
        else:
            reasons.append(f"{variant.name}: {why}")
    if not runnable:
        raise RequirementsNotMet("this machine can run no variant: " + "; ".join(reasons))
    return min(runnable, key=lambda variant: variant.target.startswith("cpu-"))


def _without_gpu(providers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in providers if name not in _PROVIDER_NAMES.values())


def available_memory_bytes() -> int:
    """Return how much memory can still be used, the control group's limit included."""
    return min(psutil.virtual_memory().available, _cgroup_limit() - _cgroup_usage())


def _version(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)


def _read_cpuinfo() -> tuple[frozenset[str], str]:
    flags: frozenset[str] = frozenset()
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features") and not flags:
                flags = frozenset(value.split())
            elif key.strip() == "model name" and not name:
                name = value.strip()
    except OSError:
        pass  # not Linux: no features are claimed, so nothing that needs one is run
    return flags, name or platform.processor() or platform.machine()


_UNLIMITED = 1 << 62


def _read_number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_limit() -> int:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        number = _read_number(path)
        if number is not None:
            return number
    return _UNLIMITED


def _cgroup_usage() -> int:
    for usage, stat, key in (
        ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
        (
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        number = _read_number(usage)
        if number is not None:
            # The kernel gives cached files back before it refuses memory.
            return max(0, number - _read_stat(stat, key))
    return 0


def _read_stat(path: str, key: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0
