"""`pollard doctor` as its users see it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from pollard.services.doctor.command import run


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pollard.client.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_this_machine_is_well(tmp_path: Path) -> None:
    done = doctor("--data-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("This machine can run Pollard.\n")
    assert "model on the processor: a small one runs" in done.stdout
    assert str(tmp_path) in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_is_bad_ends_with_1_and_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor("--json", "--provider", "cpu", "--data-dir", str(tmp_path / "file" / "below"))
    assert done.returncode == 1
    assert done.stderr == ""
    (bad,) = [each for each in json.loads(done.stdout) if each["state"] == "bad"]
    assert bad["subject"] == "data directory"
    assert bad["cure"]


def test_a_service_that_serves_is_recognized(tmp_path: Path, capsys) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    # One of three neighbouring ports, so that doctor can be told of it.
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        run(provider="cpu", data_dir=tmp_path, host="127.0.0.1", port_base=port - 1, as_json=True)
    finally:
        server.stop(None)
    found = {each["subject"]: each for each in json.loads(capsys.readouterr().out)}
    assert found[f"port {port}"]["found"] == "a gRPC service is serving there"
