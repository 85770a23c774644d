"""Small real processes that stand in for services: they answer health checks, and misbehave."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pollard.services.up.plan import ServicePlan

SERVICE = """
import os, signal, sys, time
from concurrent import futures
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

port, behaviour, journal = sys.argv[1:]

def note(what):
    with open(journal, "a") as file:
        file.write(what + "\\n")

print("hello from", behaviour, flush=True)
if behaviour == "refuses":
    print("error: I do not want to", file=sys.stderr)
    sys.exit(3)

stop = []
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
servicer = health.HealthServicer()
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
servicer.set("", health_pb2.HealthCheckResponse.SERVING if behaviour != "ill"
             else health_pb2.HealthCheckResponse.NOT_SERVING)
server.add_insecure_port(f"127.0.0.1:{port}")
server.start()
note(f"started {os.getpid()}")
while not stop:
    if behaviour == "dies" and os.path.exists(journal + ".die"):
        os._exit(7)
    if behaviour == "moody" and os.path.exists(journal + ".moody"):
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    time.sleep(0.02)
note("stopped")
server.stop(0)
"""


@dataclass(frozen=True)
class FakePlan(ServicePlan):
    """Starts SERVICE instead of a service."""

    behaviour: str = "well"
    journal: str = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", SERVICE, str(self.port), self.behaviour, self.journal]


@pytest.fixture
def fake_plans(tmp_path: Path) -> Callable[..., list[ServicePlan]]:
    """A function that makes plans: `fake_plans(inference="dies")`."""
    from pollard.services.up.plan import UpOptions, make_plan

    def make(*, replicas: int = 1, **behaviours: str) -> list[ServicePlan]:
        options = UpOptions(data_dir=tmp_path / "data", port_base=0, replicas=replicas)
        _, plans = make_plan(options)
        return [
            FakePlan(
                plan.name,
                plan.host,
                plan.port,
                (),
                behaviour=behaviours.get(plan.name, "well"),
                journal=str(tmp_path / f"{plan.name}.journal"),
            )
            for plan in plans
        ]

    return make
