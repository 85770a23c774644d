"""Python, packages, and ONNX Runtime's providers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from pollard.services.doctor.findings import Finding, bad, good, note

Provider = Literal["auto", "cpu", "cuda"]

_OLDEST_PYTHON = (3, 11)

_OURS = (
    "pollard-protos",
    "pollard-runtime",
    "pollard-client",
    "pollard-services",
    "pollard-compression",
)

_SHOWN = (
    "grpcio",
    "protobuf",
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "torch",
)

_OPTIONAL = {
    "pyvoy": "the front end --frontend envoy (pollard-services[envoy])",
    "s3fs": "bundles in S3 (pollard-services[s3])",
    "psycopg": "the registry in PostgreSQL (pollard-services[postgres])",
    "aiohttp": "images by their address (pollard-services[uris])",
}

Versions = Mapping[str, str]


def installed() -> dict[str, str]:
    """Return the version of every installed package by its name in lower case."""
    return {
        str(each.metadata["Name"]).lower(): each.version
        for each in importlib.metadata.distributions()
        if each.metadata["Name"]
    }


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    """Look at Python and the operating system."""
    words = ".".join(map(str, version))
    if version[:2] < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        yield bad("Python", words, f"install Python {oldest} or newer")
    else:
        yield good("Python", f"{words}, {sys.executable}")
    system = platform.system()
    if system != "Linux":
        yield bad("system", system, "the services run on Linux; clients run anywhere")


def packages(versions: Versions) -> Iterator[Finding]:
    """Look at what is installed."""
    ours = {name: versions[name] for name in _OURS if name in versions}
    shown = ", ".join(f"{name.removeprefix('pollard-')} {each}" for name, each in ours.items())
    if len(set(ours.values())) > 1:
        newest = max(ours.values())
        yield bad(
            "Pollard",
            f"versions that do not belong together: {shown}",
            "install all of one version: pip install " + " ".join(f"{n}=={newest}" for n in ours),
        )
    else:
        yield good("Pollard", shown or "run from its sources")
    yield good(
        "packages", ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    )
    missing = [f"{name}: {use}" for name, use in _OPTIONAL.items() if name not in versions]
    if missing:
        yield note("extras", "not installed, only needed for " + "; ".join(missing))


def onnxruntime(
    versions: Versions, provider: Provider, run: Callable[[str], None]
) -> Iterator[Finding]:
    """Look at ONNX Runtime, and run a small model on it.

    Args:
        versions: What is installed.
        provider: What it has to run on.
        run: Runs the model for a target, and raises what goes wrong.
    """
    if "onnxruntime" in versions and "onnxruntime-gpu" in versions:
        yield bad(
            "ONNX Runtime",
            "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other",
            "pip uninstall onnxruntime onnxruntime-gpu, then install one of them: "
            "pollard-runtime[cpu] or pollard-runtime[gpu]",
        )
    if importlib.util.find_spec("onnxruntime") is None:
        yield bad(
            "ONNX Runtime", "not installed", "pip install 'pollard-runtime[cpu]', or [gpu] for CUDA"
        )
        return
    yield from _session("processor", "cpu-fp32", run)
    if provider != "cpu":
        yield from _gpu(provider, run)


def _session(subject: str, target: str, run: Callable[[str], None]) -> Iterator[Finding]:
    try:
        run(target)
    except Exception as error:  # whatever goes wrong is what was looked for
        words = str(error).strip().splitlines() or [type(error).__name__]
        yield bad(f"model on the {subject}", words[0], "install onnxruntime anew")
    else:
        yield good(f"model on the {subject}", "a small one runs")


def _gpu(provider: Provider, run: Callable[[str], None]) -> Iterator[Finding]:
    from pollard.runtime import cuda

    facts = cuda.look()
    problems = cuda.problems(0, facts)
    if not problems:
        for device in facts.devices:
            size = f"{device.total_bytes / 2**30:.0f} GiB"
            yield good(f"GPU {device.index}", f"{device.name}, {size}, driver {facts.driver}")
        yield from _session("GPU", "cuda-fp16", run)
        return
    for problem in problems:
        found, _, cure = problem.partition("; ")
        if provider == "cuda":
            yield bad("GPU", found, cure or "see docs/gpu.md")
        elif facts.driver_cuda:
            # There is one, and it lies idle.
            yield note("GPU", found, cure)
        else:
            yield good("GPU", "none here; models run on the processor")
            return
