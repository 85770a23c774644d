"""The process that checks a bundle; :mod:`.checks` starts it.

It may be started while the bundle is still arriving, and waits until it is whole.

It imports as little as it can, because it starts for every upload.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle
from pollard.runtime.errors import ModelLoadFailed, RuntimeFault
from pollard.runtime.graph_scan import check_external, check_opset, scan_graph
from pollard.runtime.keys import TrustedKeys
from pollard.runtime.sessions import Session, check_signature, open_session
from pollard.runtime.signing import read_signature
from pollard.runtime.tensors import NUMPY


def _check(arguments: dict[str, object]) -> dict[str, object]:
    """Do the work; return the verdict."""
    _limit(resource.RLIMIT_AS, int(str(arguments["memory_bytes"])))
    _limit(resource.RLIMIT_CPU, 2 * int(str(arguments["cpu_seconds"])))
    _limit(resource.RLIMIT_CORE, 0)
    try:
        # Takes a while, and the bundle may still be arriving.
        importlib.import_module("onnxruntime")
        # Comes when the bundle is whole: nothing is read before.
        digests: dict[str, str] = json.loads(sys.stdin.buffer.read())
        bundle = Bundle.open(str(arguments["directory"]), verify=False)
        bundle.verify(digests)
        signature = read_signature(bundle, _trusted(arguments["trusted_keys"]))
        _check_graphs(bundle)
    except RuntimeFault as fault:
        return {"message": fault.message, "reason": fault.reason, "metadata": fault.metadata}
    # A library that does not fit into the limit cannot be loaded.
    except (MemoryError, ImportError):
        return {
            "message": "checking the bundle needs more memory than the limit allows",
            "reason": "CHECK_MEMORY",
            "metadata": {"limit_bytes": str(arguments["memory_bytes"])},
        }
    return {"ok": True, "signature": None if signature is None else asdict(signature)}


def _trusted(paths: object) -> TrustedKeys | None:
    if not isinstance(paths, dict) or not paths:
        return None
    return TrustedKeys({key: Path(path) for key, path in paths.items()})


def _check_graphs(bundle: Bundle) -> None:
    sizes = {file.path: file.size_bytes for file in bundle.manifest.files}
    _ = bundle.labels  # that they can be read
    for variant in bundle.manifest.variants:
        try:
            # Before anything parses it.
            graph = scan_graph(bundle.model_path(variant))
            check_external(graph, variant.model_file, sizes)
            check_opset(graph, variant.requirements.opset)
            session = _open(bundle.model_path(variant))
        except ModelLoadFailed as fault:
            # A graph made for an accelerator may use kernels that the CPU has
            # not: the first server that has the accelerator judges it.
            if not variant.target.startswith("cpu-") and "NOT_IMPLEMENTED" in fault.message:
                continue
            raise ModelLoadFailed(
                f"variant {variant.name!r}: {fault.message}", variant=variant.name
            ) from fault
        check_signature(session, bundle.manifest)
        _run_once(session, bundle, variant)


def _run_once(session: Session, bundle: Bundle, variant: bundle_pb2.Variant) -> None:
    """Run what the servers will run first: what never ends or eats the memory does it here.

    Whether the answers are right is for the servers, which have the machine for the variant.
    """
    golden = bundle.golden(variant)
    if golden is not None:
        feeds = golden.inputs
    else:
        feeds = {
            info.name: np.zeros([max(size, 1) for size in info.shape], NUMPY[info.datatype])
            for info in session.inputs
            if info.datatype in NUMPY
        }
    try:
        session.run(feeds)
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # Zeros need not be a valid input, and an accelerator's graph need not run here.
        memory = isinstance(error, MemoryError) or "alloc" in why.lower()
        if memory or (golden is not None and variant.target.startswith("cpu-")):
            raise ModelLoadFailed(
                f"variant {variant.name!r} cannot be run"
                + (" within the memory of a check" if memory else " on its golden inputs")
                + f": {why}",
                variant=variant.name,
            ) from error


def _open(path: Path) -> Session:
    try:
        return open_session(path, optimised=False)
    except ModelLoadFailed:
        # A node without a kernel may vanish when the graph is optimised.
        return open_session(path)


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
