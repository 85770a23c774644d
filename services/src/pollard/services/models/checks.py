"""Checks of an uploaded bundle, in a child process with limits.

A manifest or a graph made to hurt can exhaust memory, hang or crash what parses
it. So neither is parsed in the manager: the child compares every digest with the
manifest, loads every graph and compares its inputs and outputs.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from pollard.runtime.keys import TrustedKeys
from pollard.runtime.signing import Signature
from pollard.services.common.errors import InvalidRequest

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
    """A child that waits until a bundle has arrived, and then checks it."""

    def __init__(self, directory: Path, limits: CheckLimits, trusted: TrustedKeys | None) -> None:
        """Start the child.

        Args:
            directory: The bundle, which may still be arriving.
            limits: What the child may use.
            trusted: Keys whose signatures count.
        """
        self._limits = limits
        arguments = {
            "directory": str(directory),
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

    async def verdict(self, digests: Mapping[str, str]) -> Signature | None:
        """Let the child check the bundle, which must be whole, and wait for its end.

        Args:
            digests: SHA-256 of every file by path, of who has just written them.

        Returns:
            Who has signed the bundle; None when nobody has.

        Raises:
            InvalidRequest: the bundle is not acceptable; the reason says why.
        """
        # The child waits for its input.
        self._talking = asyncio.ensure_future(
            asyncio.to_thread(self._process.communicate, json.dumps(dict(digests)).encode())
        )
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
        """End the child if it still runs."""
        self._process.kill()  # does nothing when it has ended
        if self._talking is None:
            self._talking = asyncio.ensure_future(asyncio.to_thread(self._process.communicate))
        await asyncio.wait({self._talking})


def _judge(code: int | None, out: bytes, err: bytes) -> Signature | None:
    try:
        verdict = json.loads(out)
    except ValueError:
        verdict = None
    if code == 0 and isinstance(verdict, dict) and verdict.get("ok") is True:
        signed = verdict["signature"]
        return None if signed is None else Signature(**signed)
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
