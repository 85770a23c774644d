"""How a server starts, serves and stops.

Stopping: health says NOT_SERVING, so that balancers look elsewhere; requests in
flight are finished, for at most the grace; then everything is closed. A process
that is not done with that in time says what each of its threads does, and ends:
whoever stops it must not have to kill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import ipaddress
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pollard.services.common import systemd
from pollard.services.common.auth.gate import Gate
from pollard.services.common.auth.interceptor import GateInterceptor
from pollard.services.common.errors import StartupError
from pollard.services.common.open_files import watch_open_files
from pollard.services.common.reflection import reflection_pool
from pollard.services.common.telemetry import setup
from pollard.services.common.tls import server_credentials
from pollard.services.common.tls_files import PLAIN, TlsFiles

_log = structlog.get_logger("pollard.lifecycle")

T = TypeVar("T")

_CLOSING_SECONDS = 30.0
"""Longest time for closing everything, once the requests in flight have had theirs."""

_TELLING_SECONDS = 1.0
"""Longest time for saying what each thread does, before a process ends that is not done in time."""


@dataclass(frozen=True)
class Listen:
    """Where and how a server listens."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""
    max_message_bytes: int = 64 * 1024 * 1024
    """Largest message, both ways, in bytes."""
    insecure: bool = False
    """Allow an address that is not loopback though nobody has to show anything."""
    unix_socket: str | None = None
    """Also listen on this Unix socket, which the rights of its file guard."""
    tls: TlsFiles = PLAIN
    """How the port speaks TLS, if it does."""
    known_callers: bool = False
    """Whether whoever calls must show who they are: a token, or a certificate."""
    health_port: int | None = None
    """Also answer health checks, and nothing else, on this port, without TLS."""

    def check(self) -> None:
        """Check that not everybody can get in; where that is allowed, warn about it.

        Raises:
            StartupError: others reach the address, and nobody has to show anything, or tokens would
                travel in the clear.
        """
        if is_loopback(self.host):
            return
        encrypted = self.tls.certificate is not None
        if encrypted and (self.tls.client_ca is not None or self.known_callers):
            return
        problem = (
            "anybody who reaches it could use and change the models"
            if not self.known_callers
            else "tokens would travel in the clear, for everybody on the way to read and use"
        )
        if self.insecure:
            _log.warning(
                "listening insecurely, for --insecure was given", host=self.host, danger=problem
            )
            return
        raise StartupError(
            f"refusing to listen on {self.host}: {problem}. Give a certificate (--tls-certificate, "
            "--tls-key) and ask callers for tokens (--tokens) or for certificates "
            "(--tls-client-ca), listen on 127.0.0.1, or give --insecure if the network is trusted"
        )


def server_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Return the channel arguments of every Pollard server."""
    return [
        # Without this, a second server on the same port would silently share it.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Clients and balancers may ping twice a second without being sent away: that is how they
        # notice soon that a machine has gone without a word.
        ("grpc.http2.min_ping_interval_without_data_ms", 400),
        ("grpc.keepalive_permit_without_calls", 1),
        # The other way round: a switch waits for a server whose machine has gone.
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # That is for the kernel. The answer to a ping a busy process may owe for seconds; gRPC
        # waits a minute for it unless told otherwise.
        ("grpc.http2.ping_timeout_ms", 10_000),
    ]


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class HealthPort:
    """A port that answers health checks and nothing else, for probes that speak no TLS."""

    def __init__(self, servicer: health.aio.HealthServicer | None = None) -> None:
        """Answer what `servicer` answers; without one, what is told by `set_serving`."""
        self._servicer = servicer or health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.port = 0
        """The port in use, after :meth:`start`; 0 if there is none."""

    async def start(self, listen: Listen) -> None:
        """Listen, if that is wanted.

        Raises:
            StartupError: the port cannot be had.
        """
        if listen.health_port is None:
            return
        self._server = grpc.aio.server(options=server_options(1024 * 1024))
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        host = f"[{listen.host}]" if ":" in listen.host else listen.host
        try:
            self.port = self._server.add_insecure_port(f"{host}:{listen.health_port}")
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {host}:{listen.health_port} for health checks: the port is in "
                "use; choose another --health-port"
            ) from error
        await self._server.start()

    async def set_serving(self, serving: bool, names: Sequence[str] = ()) -> None:
        """Tell health, for the server and its services.

        The health service itself is SERVING as long as it answers: that tells a server that waits
        for what to serve, or drains, from one that hangs.
        """
        await self._servicer.set(health.SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        state = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *names):
            await self._servicer.set(name, state)

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            await self._server.stop(0)


@dataclass
class GrpcServer:
    """A gRPC server with health and reflection."""

    listen: Listen
    service_names: Sequence[str]
    """Full names of the services, for health and reflection."""
    interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
    gate: Gate | None = None
    """Asked before every method; None lets everybody do everything."""
    port: int = field(default=0, init=False)
    """The port in use, after :meth:`start`."""
    serving: bool = field(default=False, init=False)
    """What health says."""

    def __post_init__(self) -> None:
        self.listen.check()
        self._credentials = server_credentials(self.listen.tls)
        guards = [GateInterceptor(self.gate)] if self.gate is not None else []
        self.server = grpc.aio.server(
            interceptors=[*self.interceptors, *guards],
            options=server_options(self.listen.max_message_bytes),
        )
        self.health = health.aio.HealthServicer()
        self.health_port = HealthPort(self.health)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        names = [*self.service_names, health.SERVICE_NAME]
        reflection.enable_server_reflection(
            [*names, reflection.SERVICE_NAME], self.server, reflection_pool(names)
        )

    async def start(self) -> None:
        """Bind and begin to answer; health says NOT_SERVING until told otherwise.

        Raises:
            StartupError: the address cannot be had.
        """
        await self.set_serving(False)
        host = f"[{self.listen.host}]" if ":" in self.listen.host else self.listen.host
        address = f"{host}:{self.listen.port}"
        try:
            self.port = (
                self.server.add_insecure_port(address)
                if self._credentials is None
                else self.server.add_secure_port(address, self._credentials)
            )
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {address}: the port is in use or the address is not this "
                "machine's; stop the other program or choose another --port"
            ) from error
        if self.listen.unix_socket:
            try:
                self.server.add_insecure_port(f"unix:{self.listen.unix_socket}")
            except RuntimeError as error:
                raise StartupError(
                    f"cannot listen on the socket {self.listen.unix_socket}"
                ) from error
        await self.server.start()
        await self.health_port.start(self.listen)

    @property
    def address(self) -> str:
        """Target under which this machine reaches the server."""
        host = "127.0.0.1" if self.listen.host in ("0.0.0.0", "::") else self.listen.host  # noqa: S104 - compared, not bound
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    async def set_serving(self, serving: bool) -> None:
        """Tell health, for the server and each of its services."""
        self.serving = serving
        await self.health_port.set_serving(serving, self.service_names)

    async def stop(self, grace_seconds: float) -> None:
        """Finish the requests in flight for at most ``grace_seconds``, then close."""
        self.serving = False
        with contextlib.suppress(Exception):
            await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_seconds)
        await self.health_port.stop()


class Service(Protocol):
    """What :func:`run_service` runs."""

    async def start(self) -> None:
        """Begin to serve."""

    async def stop(self, grace_seconds: float) -> None:
        """Drain, stop and free everything."""


def run_service(make: Callable[[], Service], *, grace_seconds: float = 10.0) -> int:
    """Run a service until SIGTERM or SIGINT; return the exit code.

    For a process of its own, which ends with the service, by itself or by force.

    Args:
        make: Builds the service inside the running loop.
        grace_seconds: Longest wait for requests in flight when stopping.
    """
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            code = runner.run(_run(make, grace_seconds))
            # Threads that the loop, or the interpreter, waits for may be stuck as well.
            _end_if_stuck(_CLOSING_SECONDS)
            return code
    finally:
        setup.shut_down()


async def _run(make: Callable[[], Service], grace_seconds: float) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    service: Service | None = None
    try:
        service = make()
        starting = asyncio.ensure_future(service.start())
        waiting = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            with _within(_CLOSING_SECONDS):
                await cancel(starting)
        else:
            starting.result()
            systemd.notify("READY=1")
        watching = asyncio.ensure_future(watch_open_files())
        await waiting
        await cancel(watching)
    except StartupError as error:
        _log.error(str(error))
        if service is not None:
            with contextlib.suppress(Exception), _within(_CLOSING_SECONDS):
                await service.stop(0.0)
        return 1
    systemd.notify("STOPPING=1")
    _log.info("stopping", grace_seconds=grace_seconds)
    with _within(grace_seconds + _CLOSING_SECONDS):
        await service.stop(grace_seconds)
    _log.info("stopped")
    return 0


def _end_if_stuck(seconds: float) -> None:
    # By a thread that needs nothing of Python's. Without a standard error nobody could be told.
    with contextlib.suppress(RuntimeError, AttributeError, ValueError, OSError):
        faulthandler.dump_traceback_later(seconds, exit=True)
    # Where nobody reads the standard error, saying so would not come back either.
    signal.setitimer(signal.ITIMER_REAL, seconds + _TELLING_SECONDS)


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Run a block that ends in time, or the process does."""
    _end_if_stuck(seconds)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


async def cancel(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel tasks and wait until they have ended; their errors are dropped."""
    alive = [task for task in tasks if task is not None]
    for task in alive:
        task.cancel()
    await asyncio.gather(*alive, return_exceptions=True)


def raise_if_cancelled() -> None:
    """End a task that goes on though it has been cancelled.

    gRPC may raise how a call ended in the place of a cancellation that comes at that moment; who
    goes on after errors for ever would never end.

    Raises:
        asyncio.CancelledError: it has been cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def to_its_end(work: Awaitable[T]) -> T:
    """Wait for what goes on in a thread, even where the waiting is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # marks it as seen
        raise


async def together(*works: Coroutine[Any, Any, Any]) -> None:
    """Run coroutines at the same time; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        await cancel(*tasks)
        raise


def spawn(
    tasks: set[asyncio.Task[Any]], coroutine: Coroutine[Any, Any, Any], name: str
) -> asyncio.Task[Any]:
    """Start a background task that is kept alive in ``tasks`` and logged if it fails."""
    task: asyncio.Task[Any] = asyncio.create_task(coroutine, name=name)
    tasks.add(task)

    def ended(done: asyncio.Task[Any]) -> None:
        tasks.discard(done)
        if not done.cancelled() and done.exception() is not None:
            _log.error("background task failed", task=name, exc_info=done.exception())

    task.add_done_callback(ended)
    return task
