"""Checks of an uploaded bundle, in a child process with limits.

A tar, a manifest or a graph made to hurt can exhaust memory, hang or crash what
parses it. So nothing of an upload is parsed in the manager: the child unpacks
it, compares every digest, loads every graph and compares its inputs and outputs
with the manifest.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import structlog

from pollard.services.common.errors import InvalidRequest, ResourceExhausted, ServiceError

_log = structlog.get_logger("pollard.checks")


@dataclass(frozen=True)
class CheckLimits:
    """What the child may use."""

    timeout_seconds: float = 120.0
    """Wall-clock time."""
    memory_bytes: int = 8 * 1024**3
    """Address space; a graph takes a few times its size."""
    max_files: int = 4096
    """Most files in a bundle."""
    max_unpacked_bytes: int = 16 * 1024**3
    """Largest bundle, unpacked."""


async def check_upload(tar: Path, directory: Path, limits: CheckLimits) -> None:
    """Unpack ``tar`` into ``directory`` and check what it holds.

    On any error the directory is removed. A caller that is cancelled ends the child.

    Args:
        tar: The uploaded file.
        directory: Must not exist.
        limits: What the child may use.

    Raises:
        InvalidRequest: the bundle is not acceptable; the reason says why.
        ResourceExhausted: the disk is full.
    """
    arguments = {
        "tar": str(tar),
        "directory": str(directory),
        "max_files": limits.max_files,
        "max_unpacked_bytes": limits.max_unpacked_bytes,
        "memory_bytes": limits.memory_bytes,
        "cpu_seconds": int(limits.timeout_seconds) + 1,
    }
    # Not asyncio's own: uvloop forks, and gRPC's threads, which its fork handlers
    # start again in the child, were seen to crash there before the exec. This
    # starts it without those handlers, in a few milliseconds.
    process = subprocess.Popen(
        [
            sys.executable,
            "-P",  # nothing is imported from the directory that the manager was started in
            "-m",
            "pollard.services.models.check_child",
            json.dumps(arguments),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    talking = asyncio.ensure_future(asyncio.to_thread(process.communicate))
    try:
        await asyncio.wait({talking}, timeout=limits.timeout_seconds)
        if not talking.done():
            raise InvalidRequest(
                f"the bundle could not be checked within {limits.timeout_seconds:g} s",
                reason="CHECK_TIMEOUT",
                timeout_seconds=limits.timeout_seconds,
            )
        out, err = talking.result()
        _judge(process.returncode, out, err)
    except BaseException:
        process.kill()  # does nothing when it has ended
        await asyncio.wait({talking})
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        raise


def _judge(code: int | None, out: bytes, err: bytes) -> None:
    try:
        verdict = json.loads(out)
    except ValueError:
        verdict = None
    if code == 0 and verdict == {"ok": True}:
        return
    if isinstance(verdict, dict) and verdict.get("reason") == "DISK_FULL":
        raise _disk_full()
    if isinstance(verdict, dict) and "message" in verdict:
        raise InvalidRequest(verdict["message"], reason=verdict["reason"], **verdict["metadata"])
    if code is not None and code < 0:
        _log.warning("a check crashed", code=code, stderr=err.decode("utf-8", "replace")[-4000:])
        name = signal.Signals(-code).name if -code in list(signal.Signals) else str(-code)
        raise InvalidRequest(
            f"checking the bundle crashed with {name}: the graph is malformed, or needs more "
            "memory or time than the limits allow",
            reason="CHECK_CRASHED",
            signal=name,
        )
    raise RuntimeError(f"the check ended with {code}: {err.decode('utf-8', 'replace')[-2000:]}")


def _disk_full() -> ServiceError:
    return ResourceExhausted(
        "the disk of the store is full; nothing was stored. Free some space and try again",
        reason="DISK_FULL",
    )
