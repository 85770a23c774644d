"""Checks of an uploaded bundle, in a child process with limits.

A tar, a manifest or a graph made to hurt can exhaust memory, hang or crash what
parses it. So nothing of an upload is parsed in the manager: the child unpacks
it while it arrives, compares every digest, loads every graph and compares its
inputs and outputs with the manifest.
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

from pollard.runtime.keys import TrustedKeys
from pollard.runtime.signing import Signature
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


class Check:
    """A child that unpacks a tar, which may still be arriving, and then checks the bundle."""

    def __init__(
        self,
        tar: Path,
        total_bytes: int,
        directory: Path,
        limits: CheckLimits,
        trusted: TrustedKeys | None = None,
    ) -> None:
        """Start the child.

        Args:
            tar: The file; it must exist.
            total_bytes: Its size when it is whole.
            directory: Where to unpack; must not exist.
            limits: What the child may use.
            trusted: Keys whose signatures count.
        """
        self.directory = directory
        self._limits = limits
        arguments = {
            "tar": str(tar),
            "total_bytes": total_bytes,
            "directory": str(directory),
            "max_files": limits.max_files,
            "max_unpacked_bytes": limits.max_unpacked_bytes,
            "memory_bytes": limits.memory_bytes,
            "cpu_seconds": int(limits.timeout_seconds) + 1,
            "trusted_keys": trusted.paths() if trusted is not None else {},
        }
        # Not asyncio's own: uvloop forks, and gRPC's threads, which its fork handlers
        # start again in the child, were seen to crash there before the exec. This
        # starts it without those handlers, in a few milliseconds.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",  # nothing is imported from the directory that the manager was started in
                "-m",
                "pollard.services.models.check_child",
                json.dumps(arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._talking: asyncio.Future[tuple[bytes, bytes]] | None = None

    async def verdict(self) -> Signature | None:
        """Let the child load the graphs, and wait for its end. The tar must be whole.

        Returns:
            Who has signed the bundle; None when nobody has.

        Raises:
            InvalidRequest: the bundle is not acceptable; the reason says why.
            ResourceExhausted: the disk is full.
        """
        # It closes the child's input first, which is what the child waits for.
        self._talking = asyncio.ensure_future(asyncio.to_thread(self._process.communicate))
        await asyncio.wait({self._talking}, timeout=self._limits.timeout_seconds)
        if not self._talking.done():
            raise InvalidRequest(
                f"the bundle could not be checked within {self._limits.timeout_seconds:g} s",
                reason="CHECK_TIMEOUT",
                timeout_seconds=self._limits.timeout_seconds,
            )
        out, err = self._talking.result()
        return _judge(self._process.returncode, out, err)

    async def end(self) -> None:
        """End the child if it still runs, and delete what it unpacked."""
        self._process.kill()  # does nothing when it has ended
        if self._talking is None:
            self._talking = asyncio.ensure_future(asyncio.to_thread(self._process.communicate))
        await asyncio.wait({self._talking})
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)


def _judge(code: int | None, out: bytes, err: bytes) -> Signature | None:
    try:
        verdict = json.loads(out)
    except ValueError:
        verdict = None
    if code == 0 and isinstance(verdict, dict) and verdict.get("ok") is True:
        signed = verdict["signature"]
        return None if signed is None else Signature(**signed)
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
