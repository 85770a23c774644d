"""What a result must say of the machine and the versions that it was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

from bench.peers.fetch import PINS, ROOT
from pollard.runtime.machine import Machine

_PACKAGES = ("onnxruntime", "numpy", "grpcio", "protobuf", "uvloop", "pyvoy", "torch")


def environment() -> dict[str, object]:
    """Return date, machine, load and versions."""
    machine = Machine.detect()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": machine.processor,
        "cores": machine.cores,
        "memory_gib": round(machine.memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "commit": _commit(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "peers": dict(PINS),
    }


def heading(environment: dict[str, object]) -> str:
    """Return the environment as a paragraph of Markdown."""
    versions = environment["versions"]
    assert isinstance(versions, dict)
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{environment['date']}, commit {environment['commit']}; {environment['processor']}, "
        f"{environment['cores']} cores, {environment['memory_gib']} GiB, "
        f"{environment['system']}; Python {environment['python']}, {listed}. "
        f"Load average before the run: {environment['load_average']}."
    )


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
