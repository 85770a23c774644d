"""How long services take from their start until they take requests."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.models import BuiltModel, large_model
from bench.peers.fetch import BUILD
from bench.pollard_server import desired_state, make_bundle
from bench.process import free_port, pollard_command

_LOOK_SECONDS = 0.01


def starting(rounds: int) -> dict[str, Any]:
    """Start each service so often, its files in the page cache; return the seconds of each."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder) / name for name in ("models", "inference", "preprocess")}
        _fill(caches["inference"])
        for _ in range(rounds + 1):
            for service, place in caches.items():
                flag = "--store" if service == "models" else "--cache-dir"
                more = () if service == "models" else ("--manager", "")
                found.setdefault(service, []).append(_start(service, flag, str(place), *more))
    # The first start of each makes what later ones find.
    return {
        service: {"seconds": seconds[1:], "median": statistics.median(seconds[1:])}
        for service, seconds in found.items()
    }


def _fill(cache: Path) -> None:
    """Lay a model of 25 MB into a cache, as after a restart."""
    path = BUILD / "models" / "large25" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(large_model(1, 25))
    model = BuiltModel("large25", "25 MB", path, "cpu-fp32", "x", "y", (64,), (64,))
    bundle = make_bundle(model)
    place = cache / "bundles" / bundle.digest
    place.parent.mkdir(parents=True)
    subprocess.run(["cp", "-r", str(bundle.path), str(place)], check=True)
    state = desired_state({model.name: bundle})
    (cache / "state.json").write_text(
        json_format.MessageToJson(state, preserving_proto_field_name=True)
    )


def _start(service: str, *flags: str) -> float:
    port = free_port()
    line = [*pollard_command(), "serve", service, "--port", str(port), "--http-port", "0", *flags]
    began = time.perf_counter()
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        options = [
            ("grpc.initial_reconnect_backoff_ms", 10),
            ("grpc.min_reconnect_backoff_ms", 10),
            ("grpc.max_reconnect_backoff_ms", 20),
        ]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.RpcError):
                    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return time.perf_counter() - began
                if process.poll() is not None or time.perf_counter() - began > 60:
                    raise RuntimeError(f"{service} did not start ({process.poll()})")
                time.sleep(_LOOK_SECONDS)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def imports(service: str, most: int = 25) -> list[tuple[float, str]]:
    """Return the slowest imports of a service by themselves, in milliseconds."""
    done = subprocess.run(
        ["python", "-X", "importtime", "-c", f"import pollard.services.{service}.main"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    found = []
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            found.append((int(parts[0]) / 1000, parts[2].strip()))
    return sorted(found, reverse=True)[:most]


if __name__ == "__main__":
    np.set_printoptions(precision=3)
    print(starting(3))
