"""The process that checks a bundle; :mod:`.checks` starts it.

It imports as little as it can, because it starts for every upload.
"""

from __future__ import annotations

import ctypes
import errno
import json
import resource
import signal
import sys
from pathlib import Path

from pollard.runtime.archive import ArchiveLimits, unpack
from pollard.runtime.bundle import Bundle
from pollard.runtime.errors import ModelLoadFailed, RuntimeFault
from pollard.runtime.sessions import check_signature, open_session


def _check(arguments: dict[str, object]) -> dict[str, object]:
    """Do the work; return the verdict."""
    _limit(resource.RLIMIT_AS, int(str(arguments["memory_bytes"])))
    _limit(resource.RLIMIT_CPU, 2 * int(str(arguments["cpu_seconds"])))
    _limit(resource.RLIMIT_CORE, 0)
    try:
        directory = Path(str(arguments["directory"]))
        with open(str(arguments["tar"]), "rb") as tar:
            bundle = unpack(
                tar,
                directory,
                ArchiveLimits(
                    max_files=int(str(arguments["max_files"])),
                    max_total_bytes=int(str(arguments["max_unpacked_bytes"])),
                ),
            )
        # Opened anew: only what is on the disk counts.
        _check_graphs(Bundle.open(directory, verify=False, expect=bundle.digest))
    except RuntimeFault as fault:
        return {"message": fault.message, "reason": fault.reason, "metadata": fault.metadata}
    except MemoryError:
        return {
            "message": "checking the bundle needs more memory than the limit allows",
            "reason": "CHECK_MEMORY",
            "metadata": {"limit_bytes": str(arguments["memory_bytes"])},
        }
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return {"reason": "DISK_FULL"}
        raise
    return {"ok": True}


def _check_graphs(bundle: Bundle) -> None:
    for variant in bundle.manifest.variants:
        try:
            session = open_session(bundle.model_path(variant))
        except ModelLoadFailed as fault:
            # A graph made for an accelerator may use kernels that the CPU has
            # not: the first server that has the accelerator judges it.
            if not variant.target.startswith("cpu-") and "NOT_IMPLEMENTED" in fault.message:
                continue
            raise ModelLoadFailed(
                f"variant {variant.name!r}: {fault.message}", variant=variant.name
            ) from fault
        check_signature(session, bundle.manifest)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _end_with_parent() -> None:
    """Let the kernel end this process when the manager dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    print(json.dumps(_check(json.loads(sys.argv[1]))))
