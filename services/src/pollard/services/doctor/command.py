"""Examine this machine, and say what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.runtime.errors import RuntimeFault
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session
from pollard.services.doctor import machine as hardware
from pollard.services.doctor import software
from pollard.services.doctor.findings import Finding, State, note
from pollard.services.drill.onnx_file import classifier
from pollard.services.up.plan import default_data_dir

_MARKS = {State.GOOD: "ok  ", State.NOTE: "note", State.BAD: "BAD "}
_PORTS = (("inference", 1), ("preprocess", 11), ("models", 21))


def examine(
    provider: software.Provider, data_dir: Path | None, host: str, port_base: int
) -> Iterator[Finding]:
    """Look at everything, one thing after another."""
    yield from software.python()
    versions = software.installed()
    yield from software.packages(versions)
    yield from software.onnxruntime(versions, provider, _run)
    yield from _front_end()
    try:
        machine = Machine.detect()
    except RuntimeFault:
        # Without ONNX Runtime nothing is known of it; that was said already.
        return
    yield from hardware.processor(machine)
    yield from hardware.memory(machine)
    yield from hardware.disk((data_dir or default_data_dir()).expanduser().absolute())
    yield from hardware.ports([(name, port_base + n) for name, n in _PORTS], host, _serves)


def run(
    *,
    provider: software.Provider,
    data_dir: Path | None,
    host: str,
    port_base: int,
    as_json: bool,
) -> int:
    """Print what is found; return the exit code: 1 if something does not run."""
    found: list[Finding] = []
    for finding in examine(provider, data_dir, host, port_base):
        found.append(finding)
        if as_json:
            continue
        print(f"{_MARKS[finding.state]}  {finding.subject}: {finding.found}", flush=True)
        if finding.cure:
            print(f"      → {finding.cure}")
    broken = sum(finding.state is State.BAD for finding in found)
    if as_json:
        print(json.dumps([finding.as_dict() for finding in found], indent=1, ensure_ascii=False))
    else:
        print("This machine can run Pollard." if not broken else f"{broken} to be mended.")
    return 1 if broken else 0


def _run(target: str) -> None:
    model = classifier(side=8, classes=3, megabytes=0.01, seed=1)
    open_session(model, target=target).run({"image": np.zeros((1, 8, 8, 1), np.uint8)})


def _front_end() -> Iterator[Finding]:
    from pollard.services.inference.frontends.core import missing_from_core

    missing = missing_from_core()
    if missing:
        yield note(
            "gRPC",
            f"this grpcio lacks {', '.join(missing)}: inference uses the slower front end grpcio",
            "install the grpcio that Pollard was tested with",
        )


def _serves(address: str) -> bool:
    options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=2
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
