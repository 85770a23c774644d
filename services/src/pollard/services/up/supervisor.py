"""Keeps the services' processes running, and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.services.common.errors import StartupError
from pollard.services.common.lifecycle import cancel
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN, TlsFiles
from pollard.services.up.plan import MODELS, STOP_ORDER, ServicePlan
from pollard.services.up.priority import make_way

_FIRST_BACKOFF_SECONDS = 0.2
_LAST_BACKOFF_SECONDS = 10.0
_QUICK_DEATH_SECONDS = 10.0
_QUICK_DEATHS = 5
_HEALTH_POLL_SECONDS = 0.1
# Several checks fit into the time after which a service counts as hung: one may go wrong.
_CHECKS_BEFORE_HUNG = 4
# A service keeps to the grace by itself; only one that does not is killed, this much later.
_KILL_AFTER_GRACE_SECONDS = 5.0
_LONGEST_LINE_BYTES = 1 << 20

Notice = Callable[[str], None]
"""Takes one line for the operator."""


@dataclass
class Child:
    """One service and its current process."""

    plan: ServicePlan
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0
    last_answer: float = 0.0
    """When it last answered a health check; 0 before it has."""
    quick_deaths: int = 0
    restarts: int = 0
    last_lines: list[str] = field(default_factory=list)
    """What it said last, for the message when it cannot start."""
    _pipe: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id; None when it does not run."""
        running = self.process is not None and self.process.returncode is None
        return self.process.pid if running and self.process is not None else None

    async def start(self, write_line: Callable[[str, str], None]) -> None:
        """Start the process and pass its lines on."""
        self.last_lines.clear()
        self.started = time.monotonic()
        self.last_answer = 0.0
        self.process = await asyncio.create_subprocess_exec(
            *self.plan.command(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LONGEST_LINE_BYTES,
            # A group of its own: Ctrl-C in the terminal reaches only the supervisor, which stops
            # the services in order; and whatever the service starts can be killed with it.
            process_group=0,
        )
        self._pipe = asyncio.create_task(self._pass_on(self.process, write_line))

    async def _pass_on(
        self, process: asyncio.subprocess.Process, write_line: Callable[[str, str], None]
    ) -> None:
        assert process.stdout is not None  # noqa: S101 - asked for above
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line longer than the limit; what was read of it is gone
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip("\r\n")
            self.last_lines = [*self.last_lines[-19:], line]
            write_line(self.plan.name, line)

    async def wait(self) -> int:
        """Wait until the process has ended; return its exit code, negative for a signal."""
        assert self.process is not None  # noqa: S101 - only called after start
        code = await self.process.wait()
        if self._pipe is not None:
            # A grandchild may hold the pipe open; its lines are not waited for.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._pipe, 1.0)
        self.kill()
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        if self.pid is not None and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process and everything that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor:
    """Runs the services until it is told to stop."""

    def __init__(
        self,
        plans: Sequence[ServicePlan],
        *,
        notice: Notice,
        write_line: Callable[[str, str], None],
        changed: Callable[[], None],
        start_timeout_seconds: float = 60.0,
        grace_seconds: float = 10.0,
        hang_seconds: float = 20.0,
        tls: TlsFiles = PLAIN,
    ) -> None:
        """Make a supervisor; nothing is started yet.

        Args:
            plans: The services, in the order in which they are started.
            notice: Takes lines for the operator.
            write_line: Takes the lines of the services: name, line.
            changed: Called when processes have changed and all services are healthy.
            start_timeout_seconds: How long all may take to be healthy.
            grace_seconds: How long requests in flight may take to end.
            hang_seconds: How long a service may leave health checks without an answer before it is
                killed and started again; 0 for ever.
            tls: How the services are reached.
        """
        self._tls = tls
        self.children = {plan.name: Child(plan) for plan in plans}
        self._notice = notice
        self._write_line = write_line
        self._changed = changed
        self._start_timeout = start_timeout_seconds
        self._grace = grace_seconds
        self._hang = hang_seconds
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()

    def request_stop(self) -> None:
        """Stop cleanly; asked a second time, at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def run(self) -> int:
        """Start the services, keep them running, stop them; return the exit code.

        Raises:
            StartupError: A service did not become healthy, or keeps dying. Nothing is left
                running.
        """
        clean = True
        keepers: list[asyncio.Task[None]] = []
        try:
            await self._start_all()
            if not self._stopping.is_set():
                self._changed()
                keepers = [
                    asyncio.create_task(self._keep(child)) for child in self.children.values()
                ]
            stop = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({stop, *keepers}, return_when=asyncio.FIRST_COMPLETED)
            stop.cancel()
            for keeper in keepers:
                if keeper.done():  # it gave up, or failed in a way that nobody expected
                    keeper.result()
        finally:
            await cancel(*keepers)
            clean = await self._stop_all()
        return 0 if clean else 1

    async def _start_all(self) -> None:
        # The manager first: the others would meet a closed port, and wait before they try again.
        give_up = time.monotonic() + self._start_timeout
        first, *others = self.children.values()
        for wave in ([first], others):
            for child in wave:
                await child.start(self._write_line)
            await self._until_healthy(wave, give_up)
            if self._stopping.is_set():
                return

    async def _until_healthy(self, wave: Sequence[Child], give_up: float) -> None:
        """Wait until services that were just started are healthy, or the operator stops them.

        Raises:
            StartupError: One of them, or one started before, has ended or takes too long.
        """
        started = [child for child in self.children.values() if child.process is not None]
        waiting = [asyncio.create_task(self._first_healthy(child)) for child in wave]
        healthy = asyncio.ensure_future(asyncio.gather(*waiting))
        deaths = [asyncio.create_task(child.wait()) for child in started]
        stop = asyncio.create_task(self._stopping.wait())
        tasks: list[asyncio.Future[Any]] = [healthy, stop, *deaths]
        try:
            await asyncio.wait(
                tasks,
                timeout=max(0.0, give_up - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if stop.done():
                return
            for child, death in zip(started, deaths, strict=True):
                if death.done():
                    raise StartupError(_could_not_start(child, death.result()))
            if not healthy.done():
                names = ", ".join(child.plan.name for child in wave)
                raise StartupError(
                    f"the services ({names}) were not all healthy after {self._start_timeout:g} s; "
                    "--start-timeout allows more"
                )
            healthy.result()
        finally:
            await cancel(*tasks, *waiting)

    async def _keep(self, child: Child) -> None:
        """Start a service again whenever it dies or hangs.

        Raises:
            StartupError: It has died too often in a row.
        """
        name = child.plan.name
        while True:
            code, hung = await self._until_ended(child)
            # One that hung was of use only as long as it answered.
            ended = max(child.started, child.last_answer) if hung else time.monotonic()
            quick = ended - child.started < _QUICK_DEATH_SECONDS
            child.quick_deaths = child.quick_deaths + 1 if quick else 1
            how = "hung and was killed" if hung else _how(code)
            if child.quick_deaths > _QUICK_DEATHS:
                raise StartupError(
                    f"{name} died {child.quick_deaths} times, each time within "
                    f"{_QUICK_DEATH_SECONDS:g} s ({how}), so all services are stopped."
                    + _said(child)
                )
            pause = min(
                _FIRST_BACKOFF_SECONDS * 2 ** (child.quick_deaths - 1), _LAST_BACKOFF_SECONDS
            )
            self._notice(f"{name} {how}; starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            await child.start(self._write_line)
            child.restarts += 1
            self._notice(f"{name} runs again as process {child.pid}")

    async def _until_ended(self, child: Child) -> tuple[int, bool]:
        """Wait until a service has ended; return its exit code, and whether it hung and was killed.

        One that was started again is announced once it is healthy.
        """
        died = asyncio.create_task(child.wait())
        hung = asyncio.create_task(self._until_hung(child))
        tasks: list[asyncio.Task[Any]] = [died, hung]
        if child.restarts:
            tasks.append(asyncio.create_task(self._announce(child)))
        try:
            await asyncio.wait({died, hung}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                return died.result(), False
            since = time.monotonic() - max(child.started, child.last_answer)
            self._notice(
                f"{child.plan.name} (process {child.pid}) has not answered a health check for "
                f"{since:.0f} s: it hangs, and is killed"
            )
            child.kill()
            return await died, True
        finally:
            await cancel(*tasks)

    async def _until_hung(self, child: Child) -> None:
        """Return when a service has left health checks without any answer for too long.

        An answer that it does not serve now is an answer. Until the first one it has the time that
        a start may take.
        """
        if self._hang <= 0:
            await asyncio.Event().wait()
        pause = self._hang / _CHECKS_BEFORE_HUNG
        async with self._channel(child) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                try:
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=pause)
                    child.last_answer = time.monotonic()
                except grpc.RpcError:
                    limit = (
                        self._hang if child.last_answer else max(self._hang, self._start_timeout)
                    )
                    if time.monotonic() - max(child.started, child.last_answer) >= limit:
                        return
                    # A check that failed by its deadline has taken its time already.
                    await asyncio.sleep(min(pause, 0.2))
                else:
                    await asyncio.sleep(pause)

    def _channel(self, child: Child) -> grpc.aio.Channel:
        options = [("grpc.max_reconnect_backoff_ms", 200)]
        return open_channel(child.plan.address, self._tls, options)

    async def _announce(self, child: Child) -> None:
        await self._healthy(child)
        self._notice(f"{child.plan.name} is healthy again")
        self._changed()

    async def _first_healthy(self, child: Child) -> None:
        """Return when a service says that it serves, as `_healthy` does.

        Raises:
            StartupError: Its certificate cannot be trusted, which does not pass by itself.
        """

        def judge(error: grpc.aio.AioRpcError) -> None:
            if words := _distrust(error.details() or "", child.plan.address):
                raise StartupError(f"the certificate that {child.plan.name} shows {words}")

        await self._healthy(child, judge)

    async def _healthy(
        self, child: Child, judge: Callable[[grpc.aio.AioRpcError], None] | None = None
    ) -> None:
        """Return when a service says that it serves; `judge` hears of checks that fail."""
        async with self._channel(child) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                try:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                    child.last_answer = time.monotonic()
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        if child.plan.service == MODELS and child.pid is not None:
                            make_way(child.pid)
                        return
                except grpc.aio.AioRpcError as error:
                    if judge is not None:
                        judge(error)
                await asyncio.sleep(_HEALTH_POLL_SECONDS)

    async def _stop_all(self) -> bool:
        """Stop the services one after another; say whether none had to be killed."""
        clean = True
        for service in STOP_ORDER:
            alike = [
                child
                for child in self.children.values()
                if child.plan.service == service and child.pid is not None
            ]
            clean = all(await asyncio.gather(*(self._stop(child) for child in alike))) and clean
        return clean

    async def _stop(self, child: Child) -> bool:
        """Stop a service; say whether it stopped by itself and well."""
        name = child.plan.name
        child.signal(signal.SIGTERM)
        ended = asyncio.create_task(child.wait())
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait(
            {ended, hurry},
            timeout=self._grace + _KILL_AFTER_GRACE_SECONDS,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hurry.cancel()
        clean = True
        if not ended.done():
            child.kill()
            clean = False
            self._notice(f"{name} did not stop in time and was killed")
        code = await ended
        if code not in (0, -signal.SIGKILL, -signal.SIGTERM):
            clean = False
            self._notice(f"{name} {_how(code)} while stopping")
        return clean


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _distrust(details: str, address: str) -> str:
    """Say why a service's certificate is not trusted; empty where that is not the trouble."""
    if "Hostname Verification Check failed" in details:
        host = address.rpartition(":")[0]
        return (
            f"is not for {host}, where the services reach each other: name one that it is for "
            "with --tls-name"
        )
    if "certificate has expired" in details:
        return "has ended: renew it"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "is signed by no authority of --tls-ca"
    return ""


def _could_not_start(child: Child, code: int) -> str:
    return f"{child.plan.name} {_how(code)} before it was healthy." + _said(child)


def _said(child: Child) -> str:
    lines = [line for line in child.last_lines if line.strip()][-5:]
    if not lines:
        return ""
    return " It said:\n" + "\n".join(f"  {line}" for line in lines)


def install_signals(supervisor: Supervisor) -> None:
    """Have SIGTERM and Ctrl-C stop the services."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if sys.platform != "win32":
            loop.add_signal_handler(number, supervisor.request_stop)
