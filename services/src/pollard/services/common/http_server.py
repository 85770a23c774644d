"""The HTTP port beside a service's gRPC port: health for probes, metrics, and what a service adds.

It lives in the service's event loop, speaks TLS with the same certificates, and takes no more
connections than it can hold open beside those of gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import structlog

from pollard.services.common.errors import StartupError
from pollard.services.common.telemetry.access_log import AccessLog
from pollard.services.common.telemetry.request_ids import REQUEST_ID, request_id_of
from pollard.services.common.tls_files import PLAIN, TlsFiles
from pollard.services.common.tls_renewal import http_context

if TYPE_CHECKING:
    # Imported when the port is opened: it takes longer than all of gRPC.
    from aiohttp import web

_log = structlog.get_logger("pollard.http")

_MOST_CONNECTIONS = 256
"""Beyond them a connection is closed at once: each takes a file descriptor from gRPC's."""

_QUIET_SECONDS = 30.0
"""How long a connection may say nothing, or not finish saying what it wants."""

_HANDSHAKE_SECONDS = 10.0

_BACKLOG = 128

HEALTH_PATHS = ("/health/live", "/health/ready")
"""For everybody who reaches the port; whatever else there is may ask who wants it."""

Part = Callable[["web.Application"], None]
"""Adds routes to the application, before it serves."""

Guard = Callable[["web.Request"], Awaitable[None]]
"""Raises one of aiohttp's HTTP exceptions if a request may not have what it asks for."""


@dataclass(frozen=True)
class HttpListen:
    """Where and how the HTTP port listens."""

    host: str = "127.0.0.1"
    port: int | Literal["auto", "off"] = "auto"
    """0 takes a free one; ``auto`` takes the one after `beside`, or a free one if that is in use;
    ``off`` opens none."""
    beside: int = 0
    """The gRPC port that was asked for."""
    tls: TlsFiles = PLAIN
    max_body_bytes: int = 1024 * 1024
    """Largest body of a request, in bytes."""


class HttpServer:
    """The HTTP port of one service."""

    def __init__(
        self, listen: HttpListen, *, ready: Callable[[], bool], access: AccessLog | None = None
    ) -> None:
        """Make it; nothing listens yet.

        Args:
            listen: Where.
            ready: Whether the service takes requests.
            access: Where requests are told of; None tells of none.

        Raises:
            StartupError: a file of TLS cannot be used.
        """
        self.port = 0
        """The port in use; 0 when there is none."""
        self.guard: Guard | None = None
        """Asked about every request but those for health. None lets everybody in, or, where the
        service knows its clients, those who show a certificate."""
        self._listen = listen
        self._ready = ready
        self._access = access
        self._parts: list[tuple[Part, bool]] = [(self._add_health, False)]
        self._own: set[Any] = set()
        self._context = None if listen.port == "off" else http_context(listen.tls)
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Under which this machine reaches it; empty when there is no port."""
        if not self.port:
            return ""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._listen.host, self._listen.host)  # noqa: S104 - compared, not bound
        scheme = "http" if self._context is None else "https"
        return (
            f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"
        )

    def add(self, part: Part, *, knows_visitors: bool = False) -> None:
        """Have `part` add its routes when the port opens.

        Args:
            part: Adds them.
            knows_visitors: They ask by themselves who wants something, so that the guard is not
                asked.
        """
        self._parts.append((part, knows_visitors))

    async def start(self) -> None:
        """Open the port.

        Raises:
            StartupError: it cannot be had.
        """
        if self._listen.port == "off":
            return
        listener = self._bind()
        try:
            # Some 0.3 s of imports, in which gRPC's requests are answered.
            web = await asyncio.to_thread(_import_web)
            application = web.Application(
                middlewares=[self._middleware()],
                client_max_size=self._listen.max_body_bytes,
            )
            for part, knows_visitors in self._parts:
                before = set(application.router.routes())
                part(application)
                if knows_visitors:
                    self._own |= set(application.router.routes()) - before
            runner = web.AppRunner(
                application,
                access_log=None,
                keepalive_timeout=_QUIET_SECONDS,
                handle_signals=False,
            )
            await runner.setup()
            accepted = runner.server
            assert accepted is not None  # noqa: S101 - made by setup

            def accept() -> asyncio.Protocol:
                crowded = len(accepted.connections) >= _MOST_CONNECTIONS
                protocol: asyncio.Protocol = _TooMany() if crowded else accepted()
                return protocol

            self._runner = runner
            self._server = await asyncio.get_running_loop().create_server(
                accept,
                sock=listener,
                ssl=self._context,
                ssl_handshake_timeout=None if self._context is None else _HANDSHAKE_SECONDS,
                backlog=_BACKLOG,
            )
        except BaseException:
            listener.close()
            await self.stop()
            raise
        self.port = listener.getsockname()[1]
        _log.info("answers over HTTP", url=self.url)

    async def stop(self) -> None:
        """Close the port; requests under way have a moment to end."""
        server, runner = self._server, self._runner
        self._server = self._runner = None
        if server is not None:
            server.close()
        if runner is not None:
            assert runner.server is not None  # noqa: S101 - made by setup
            await runner.shutdown()
            await runner.server.shutdown(1.0)
            await runner.cleanup()

    def _bind(self) -> socket.socket:
        wanted = self._listen.port
        if isinstance(wanted, int):
            return self._bind_to(wanted)
        beside = self._listen.beside + 1 if 0 < self._listen.beside < 65535 else 0
        if beside:
            try:
                return self._bind_to(beside)
            except StartupError:
                _log.warning(
                    "the port beside gRPC's is in use, so HTTP takes a free one; choose another "
                    "with --http-port",
                    port=beside,
                )
        return self._bind_to(0)

    def _bind_to(self, port: int) -> socket.socket:
        host = self._listen.host.strip("[]")
        listener: socket.socket | None = None
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            # Linux lets two bind who have said that they reuse, and only one listen.
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            if listener is not None:
                listener.close()
            raise StartupError(
                f"cannot listen on {host}:{port} for HTTP: {error.strerror or error}; stop the "
                "other program, or choose another --http-port (0 takes a free one, off opens none)"
            ) from error
        return listener

    def _middleware(self) -> Any:
        """Return what asks the guard, and tells nobody what went wrong inside."""
        from aiohttp import web

        @web.middleware
        async def answer(
            request: web.Request,
            handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
        ) -> web.StreamResponse:
            began = time.perf_counter()
            request_id = request_id_of(request.headers.get(REQUEST_ID, ""))
            status = 499  # its client has gone
            # Each request of a connection is answered by the same task.
            with structlog.contextvars.bound_contextvars(request_id=request_id):
                try:
                    if request.match_info.route in self._own:
                        await self._let_known_in(request)
                    elif request.path not in HEALTH_PATHS:
                        await (self.guard or self._let_known_in)(request)
                    response = await handler(request)
                    status = response.status
                except web.HTTPException as error:
                    status = error.status
                    error.headers[REQUEST_ID] = request_id
                    raise
                except Exception as error:
                    status = 500
                    _log.error("unexpected error", exc_info=error)
                    response = web.Response(
                        status=500,
                        text="internal error; the server's log has it under request id "
                        f"{request_id}\n",
                    )
                finally:
                    self._tell(request, status, time.perf_counter() - began, request_id)
            if not response.prepared:
                response.headers[REQUEST_ID] = request_id
            return response

        return answer

    def _tell(self, request: web.Request, status: int, seconds: float, request_id: str) -> None:
        if self._access is not None and request.path not in (*HEALTH_PATHS, "/metrics"):
            self._access.note_http(request.method, request.path, status, seconds, request_id)

    async def _let_known_in(self, request: web.Request) -> None:
        from aiohttp import web

        if not self._listen.tls.knows_clients or request.transport is None:
            return
        if not request.transport.get_extra_info("peercert"):
            raise web.HTTPForbidden(
                text="only for clients that show a certificate (--tls-client-ca)\n"
            )

    def _add_health(self, application: web.Application) -> None:
        from aiohttp import web

        async def live(_: web.Request) -> web.Response:
            return web.Response(text="live\n", headers={"Cache-Control": "no-store"})

        async def ready(_: web.Request) -> web.Response:
            is_ready = self._ready()
            return web.Response(
                text="ready\n" if is_ready else "not ready\n",
                status=200 if is_ready else 503,
                headers={"Cache-Control": "no-store"},
            )

        application.router.add_get("/health/live", live)
        application.router.add_get("/health/ready", ready)


class _TooMany(asyncio.Protocol):
    """Closes a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        with contextlib.suppress(OSError):
            transport.close()


def _import_web() -> Any:
    from aiohttp import web

    return web
