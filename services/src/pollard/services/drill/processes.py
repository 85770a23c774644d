"""The services that a drill starts for itself: they can be killed, and are started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.services.common.lifecycle import cancel
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.options import Installation
from pollard.services.drill.room import LOG_NAME
from pollard.services.up.plan import (
    INFERENCE,
    MODELS,
    PREPROCESS,
    STOP_ORDER,
    ServicePlan,
    UpOptions,
    make_plan,
)
from pollard.services.up.priority import make_way

# Starting takes each some two seconds of processor time, and a machine may have much else to do.
_START_SECONDS = 150.0
_STOP_SECONDS = 20.0
_HEALTH_POLL_SECONDS = 0.05
# As long as `pollard up` waits after a first death.
_RESTART_PAUSE_SECONDS = 0.2
# A client that met a closed port waits for up to two seconds before it tries again.
_RECONNECT_SECONDS = 2.5
# So long VisionService looks for an inference server that answers.
_PATIENCE_SECONDS = 9.0


@dataclass
class Outage:
    """From the kill of a service until its clients have found it again."""

    service: str
    began: float
    ended: float = float("inf")


@dataclass(frozen=True)
class Usage:
    """What a service takes of the machine at one moment, its child processes included."""

    memory_bytes: int
    """Resident."""
    files: int
    """Open file descriptors."""
    threads: int


@dataclass
class _Running:
    plan: ServicePlan
    process: subprocess.Popen[bytes] | None = None
    healthy: asyncio.Event = field(default_factory=asyncio.Event)
    killed: bool = False
    before: Sequence[str] = ()
    """What the command line begins with."""


class Services:
    """Inference, preprocess and models, each a process of its own."""

    def __init__(
        self,
        directory: Path,
        *,
        drain_seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Choose ports; `running_services` starts the processes.

        Args:
            directory: Where their data and their log lie.
            drain_seconds: How long a revision that is no longer served stays loaded.
            environment: More variables for them.
        """
        _, plans = make_plan(UpOptions(data_dir=directory / "data", port_base=0))
        self._services = {plan.name: _Running(plan) for plan in plans}
        self._environment = {
            **os.environ,
            "POLLARD_MODELS_DRAIN_SECONDS": str(drain_seconds),
            **(environment or {}),
        }
        self.log = directory / LOG_NAME
        self.outages: list[Outage] = []
        self.deaths: list[str] = []
        """Services that ended without having been killed by the drill, in words."""
        self.pids: list[int] = []
        """Of all processes that were started for them."""
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def plans(self) -> list[ServicePlan]:
        """How each is started."""
        return [service.plan for service in self._services.values()]

    def change(self, plan: ServicePlan, before: Sequence[str] = ()) -> None:
        """Start a service in another way from its next start on.

        Args:
            plan: Of the same name.
            before: What the command line begins with, such as a program that changes the network.
        """
        service = self._services[plan.name]
        service.plan, service.before = plan, before

    def pid(self, name: str) -> int:
        """Return the id of a service's process.

        Raises:
            DrillFailed: it does not run.
        """
        process = self._services[name].process
        if process is None or process.poll() is not None:
            raise DrillFailed(f"{name} does not run\n{self.tail()}")
        return process.pid

    @property
    def installation(self) -> Installation:
        """Where they are reached."""
        return Installation(
            models=self._services[MODELS].plan.address,
            vision=self._services[PREPROCESS].plan.address,
            inference=self._services[INFERENCE].plan.address,
        )

    async def start(self) -> None:
        """Start all and wait until they are healthy.

        Raises:
            DrillFailed: one ended, or they take too long.
        """
        try:
            async with asyncio.timeout(_START_SECONDS):
                # The manager first: the others would meet a closed port.
                for service in self._services.values():
                    self._launch(service)
                    if service.plan.name == MODELS:
                        await self._until_healthy(service)
                for service in self._services.values():
                    await self._until_healthy(service)
        except TimeoutError:
            raise DrillFailed(
                f"the services were not healthy after {_START_SECONDS:g} s\n{self.tail()}"
            ) from None
        self._keepers = [
            asyncio.create_task(self._keep(service), name=f"keep-{service.plan.name}")
            for service in self._services.values()
        ]

    async def stop(self) -> None:
        """Stop them in order; who does not stop is killed and counts as a death."""
        await cancel(*self._keepers)
        for name in STOP_ORDER:
            process = self._services[name].process if name in self._services else None
            if process is None or process.poll() is not None:
                continue
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                code = await asyncio.wait_for(_ended(process), _STOP_SECONDS)
            except TimeoutError:
                self._kill(process)
                code = await _ended(process)
            if code != 0:
                self.deaths.append(f"{name} did not stop cleanly (exit code {code})")

    def kill(self, name: str) -> None:
        """Kill a service with SIGKILL; it is started again at once."""
        service = self._services[name]
        if service.process is None or service.process.poll() is not None:
            return
        service.killed = True
        service.healthy.clear()
        self.outages.append(Outage(name, time.monotonic()))
        self._kill(service.process)

    async def all_healthy(self) -> None:
        """Wait until every service is healthy.

        Raises:
            DrillFailed: one does not become healthy again.
        """
        try:
            async with asyncio.timeout(_START_SECONDS):
                for service in self._services.values():
                    await service.healthy.wait()
        except TimeoutError:
            raise DrillFailed(
                f"{service.plan.name} is not healthy {_START_SECONDS:g} s after it was killed\n"
                f"{self.tail()}"
            ) from None

    def was_down(self, names: tuple[str, ...], since: float) -> bool:
        """Say whether one of the services was killed or away at any time from `since` to now."""
        return any(
            outage.service in names and outage.ended + _RECONNECT_SECONDS >= since
            for outage in self.outages
        )

    def was_down_long(self, name: str) -> bool:
        """Say whether a service has been away for longer than VisionService waits for it."""
        now = time.monotonic()
        return any(
            outage.service == name and min(now, outage.ended) - outage.began > _PATIENCE_SECONDS
            for outage in self.outages[-4:]
        )

    @property
    def http_urls(self) -> list[str]:
        """HTTP ports of the services."""
        return [f"http://{plan.dialled}:{plan.http_port}" for plan in self.plans]

    def memory_bytes(self) -> dict[str, int]:
        """Return the resident memory of each service that runs, its child processes included."""
        return {name: usage.memory_bytes for name, usage in self.usage().items()}

    def usage(self) -> dict[str, Usage]:
        """Return what each service that runs takes, its child processes included."""
        found = {}
        for name, service in self._services.items():
            if service.process is None or service.process.poll() is not None:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(service.process.pid)
                family = [process, *process.children(recursive=True)]
                found[name] = Usage(
                    sum(each.memory_info().rss for each in family),
                    sum(each.num_fds() for each in family),
                    sum(each.num_threads() for each in family),
                )
        return found

    def tail(self, lines: int = 15) -> str:
        """Return the last lines that the services wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _launch(self, service: _Running) -> None:
        # Not by the event loop: uvloop's fork runs gRPC's handlers, and those may crash the child.
        with self.log.open("ab") as log:
            service.process = subprocess.Popen(
                [*service.before, *service.plan.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                # Ctrl-C reaches the drill alone, which ends its requests before the services.
                process_group=0,
            )
        self.pids.append(service.process.pid)

    async def _keep(self, service: _Running) -> None:
        name = service.plan.name
        while True:
            assert service.process is not None  # noqa: S101 - set by start
            code = await _ended(service.process)
            self._kill(service.process)  # what it started must not outlive it
            if not service.killed:
                self.deaths.append(f"{name} ended by itself with exit code {code}")
                service.healthy.clear()
                self.outages.append(Outage(name, time.monotonic()))
            service.killed = False
            await asyncio.sleep(_RESTART_PAUSE_SECONDS)
            self._launch(service)
            healthy = asyncio.create_task(self._until_healthy(service))
            died = asyncio.create_task(_ended(service.process))
            try:
                await asyncio.wait({healthy, died}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel(healthy, died)
            if service.healthy.is_set():
                for outage in self.outages:
                    if outage.service == name:
                        outage.ended = min(outage.ended, time.monotonic())

    async def _until_healthy(self, service: _Running) -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 100)]
        async with grpc.aio.insecure_channel(service.plan.address, options=options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                process = service.process
                if process is not None and process.poll() not in (None, -signal.SIGKILL):
                    raise DrillFailed(
                        f"{service.plan.name} did not start (exit code {process.returncode})\n"
                        f"{self.tail()}"
                    )
                with contextlib.suppress(grpc.RpcError):
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        if service.plan.name == MODELS and process is not None:
                            make_way(process.pid)
                        service.healthy.set()
                        return
                await asyncio.sleep(_HEALTH_POLL_SECONDS)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait until a process has ended; return its exit code, negative for a signal."""
    descriptor = os.pidfd_open(process.pid) if process.poll() is None else None
    if descriptor is not None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
    return process.wait()


@asynccontextmanager
async def running_services(
    directory: Path, *, drain_seconds: float, said: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Services]:
    """Start the services, and stop them whatever happens.

    Raises:
        DrillFailed: they do not start.
    """
    async with started(Services(directory, drain_seconds=drain_seconds), said=said) as services:
        yield services


@asynccontextmanager
async def started(
    services: Services, *, said: Callable[[str], None] = lambda _: None
) -> AsyncIterator[Services]:
    """Start services that have been prepared, and stop them whatever happens.

    Raises:
        DrillFailed: they do not start.
    """
    try:
        await services.start()
        where = services.installation
        said(
            f"Services of the drill: inference {where.inference}, preprocess {where.vision}, "
            f"models {where.models}"
        )
        yield services
    finally:
        await services.stop()
