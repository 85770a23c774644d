"""The machine: GPU, driver, libraries, and whether ONNX Runtime gets the provider asked for."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from bench.gpu.setup import Setup, Table, say

_PACKAGES = (
    *("onnxruntime", "onnxruntime-gpu", "torch", "onnx", "onnxscript", "numpy", "grpcio"),
    *("protobuf", "uvloop", "pydantic", "torch-pruning"),
)
_QUERY = (
    *("name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm"),
    *("power.limit", "compute_cap"),
)


def run(setup: Setup) -> None:
    """Look at the machine, and open a session on the provider."""
    setup.keep("machine", _machine())
    setup.keep("versions", _versions())
    setup.keep("gpu", _gpu())
    import onnxruntime

    setup.keep(
        "onnxruntime",
        {
            "version": onnxruntime.__version__,
            "file": str(Path(onnxruntime.__file__).parent),
            "providers": onnxruntime.get_available_providers(),
        },
    )
    if setup.provider == "cuda":
        setup.keep("missing_libraries", _missing_libraries(Path(onnxruntime.__file__).parent))
    from bench.gpu.sessions import make_session, tiny_model

    try:
        session = make_session(tiny_model(), setup.provider)
    except Exception as error:
        setup.keep("session", f"failed: {error}")
        raise
    setup.keep("session", f"runs on {session.get_providers()[0]}")
    say(f"a session {setup.data['session']}")


def _machine() -> dict[str, Any]:
    from pollard.runtime.machine import Machine

    machine = Machine.detect()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": machine.processor,
        "cores": machine.cores,
        "memory_gib": round(machine.memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _versions() -> dict[str, str]:
    # Of several on the path the first is the one that is imported.
    found: dict[str, str] = {}
    for each in distributions():
        name = (each.metadata["Name"] or "").lower().replace("_", "-")
        if name in _PACKAGES or name.startswith(("nvidia-cudnn", "nvidia-cuda-runtime")):
            found.setdefault(name, each.version)
    return dict(sorted(found.items()))


def _gpu() -> dict[str, str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return {"problem": f"nvidia-smi: {error}"}
    values = [each.strip() for each in done.stdout.splitlines()[0].split(",")]
    return dict(zip(_QUERY, values, strict=False))


def _missing_libraries(onnxruntime: Path) -> list[str]:
    library = onnxruntime / "capi" / "libonnxruntime_providers_cuda.so"
    if not library.exists():
        return [f"{library.name}: this onnxruntime has no CUDA provider"]
    done = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False)
    return [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]


def tables(data: dict[str, Any]) -> list[Table]:
    """Return what was found as one table."""
    rows: list[tuple[str, object]] = []
    for part, values in data.items():
        if isinstance(values, dict):
            rows += [(f"{part}: {name}", value) for name, value in values.items()]
        else:
            rows.append((part, values))
    return [Table("Machine", ("what", "found"), rows)]
