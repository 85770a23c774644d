"""The processor, memory, disk, and ports."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from pollard.runtime.machine import Machine
from pollard.services.doctor.findings import Finding, bad, good, note

_LITTLE_MEMORY = 2 << 30
_LITTLE_DISK = 5 << 30
_LITTLE_SHARED = 64 << 20
_FEW_FILES = 4096


def processor(machine: Machine) -> Iterator[Finding]:
    """Look at the processor."""
    features = [
        name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
        if name in machine.cpu_features
    ]  # fmt: skip
    yield good(
        "processor", f"{machine.processor}, {machine.cores} cores, {', '.join(features) or 'plain'}"
    )
    if not machine.has_vnni:
        yield note(
            "8-bit models",
            "this processor has no VNNI: they are smaller here, but hardly faster than float",
            "measure on a processor with avx512_vnni or avx_vnni what will be served on one",
        )


def memory(machine: Machine, available: int | None = None) -> Iterator[Finding]:
    """Look at the memory that is left."""
    left = psutil.virtual_memory().available if available is None else available
    words = f"{left / 2**30:.1f} of {machine.memory_bytes / 2**30:.1f} GiB available"
    if left < _LITTLE_MEMORY:
        yield note(
            "memory",
            words,
            "a swap holds two revisions at a time: free some, or serve smaller models",
        )
    else:
        yield good("memory", words)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _FEW_FILES:
        yield note(
            "open files",
            f"at most {soft}: each connection takes one",
            f"ulimit -n {min(hard, 65536) if hard > 0 else 65536} before the start",
        )


def disk(data_dir: Path) -> Iterator[Finding]:
    """Look at where registry, bundles and caches go."""
    there = data_dir
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield bad(
            "data directory",
            f"{data_dir} cannot be written",
            "give pollard up another one with --data-dir, or get its rights",
        )
        return
    free = shutil.disk_usage(there).free
    words = f"{data_dir}, {free / 2**30:.1f} GiB free"
    if free < _LITTLE_DISK:
        yield note("data directory", words, "every revision of a model is kept: make room")
    else:
        yield good("data directory", words)
    shared = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies
    if shared.is_dir() and shutil.disk_usage(shared).free < _LITTLE_SHARED:
        yield note(
            "shared memory",
            f"{shutil.disk_usage(shared).free >> 20} MiB free in {shared}",
            "tensors in shared memory need it; in a container give it more with --shm-size",
        )


def ports(
    wanted: Sequence[tuple[str, int]], host: str, serves: Callable[[str], bool]
) -> Iterator[Finding]:
    """Look at the ports of the services.

    Args:
        wanted: Service and port.
        host: Address that they would listen on.
        serves: Whether a gRPC server at an address says that it serves.
    """
    for service, port in wanted:
        try:
            with socket.create_server((host, port)):
                yield good(f"port {port}", f"free for {service}")
        except PermissionError:
            yield bad(f"port {port}", "only root may listen on it", "choose one above 1023")
        except OSError as error:
            if serves(f"{host}:{port}"):
                yield good(f"port {port}", "a gRPC service is serving there")
            else:
                yield note(
                    f"port {port}",
                    f"{service} cannot listen on it: {error.strerror}",
                    f"stop the other program, or choose others: pollard up --port-base N or "
                    f"--{service}-port N",
                )
