"""The front end over Envoy: HTTP/2 by Envoy, the server inside it as an ASGI application.

pyvoy embeds Python in Envoy, so Envoy is a child of this process and the server lives in it. The
two talk over a socket: this process says when to stop, the server says when it has. If either goes,
so does the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from pollard.services.common.errors import StartupError
from pollard.services.common.lifecycle import HealthPort, Listen
from pollard.services.inference.frontends.asgi import GrpcApplication, Scope, Send
from pollard.services.inference.frontends.receiving import Receive
from pollard.services.inference.settings import InferenceSettings

_log = structlog.get_logger("pollard.inference.envoy")

_SETTINGS = "POLLARD_ENVOY_SETTINGS"
_CONTROL = "POLLARD_ENVOY_CONTROL"

_APPLICATION = f"{__name__}:application"

_START_SECONDS = 60.0


class EnvoyFront:
    """Stands where `GrpcServer` stands when calls come through Envoy."""

    def __init__(self, settings: InferenceSettings, application: GrpcApplication) -> None:
        """Take the application that answers; Envoy listens already."""
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - compared, not bound
        self.port = settings.port
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.application = application
        self._listen = Listen(settings.host, health_port=settings.health_port)
        self.health_port = HealthPort()

    async def start(self) -> None:
        """Wait until Envoy listens, which it does when it has started the application."""
        await self.health_port.set_serving(False)
        await self.health_port.start(self._listen)
        host, _, port = self.address.rpartition(":")
        while True:
            try:
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return

    @property
    def serving(self) -> bool:
        """What health says."""
        return self.application.serving

    async def set_serving(self, serving: bool) -> None:
        """Tell health."""
        self.application.set_serving(serving)
        await self.health_port.set_serving(serving)

    async def stop(self, grace_seconds: float) -> None:
        """Finish the calls in flight for at most `grace_seconds`."""
        await self.health_port.stop()
        await self.application.stop(grace_seconds)

    def stop_streams(self) -> None:
        """Do nothing: `stop` ends them."""


def run(settings: InferenceSettings) -> int:
    """Serve through Envoy until SIGTERM or SIGINT; return the exit code.

    Raises:
        StartupError: pyvoy is not installed, Envoy cannot have the address, or the server in it
            did not start.
    """
    try:
        import pyvoy
    except ImportError:
        raise StartupError(
            "--frontend envoy needs pyvoy; install pollard-services[envoy], or leave --frontend out"
        ) from None
    if settings.unix_socket:
        raise StartupError("--frontend envoy listens on no Unix socket; leave --unix-socket out")
    if settings.tls_certificate is not None:
        raise StartupError("--frontend envoy does not speak TLS; leave --frontend out")
    known = settings.gate_rules.enforced
    Listen(settings.host, insecure=settings.insecure, known_callers=known).check()
    del pyvoy
    return asyncio.run(_supervise(settings))


async def _supervise(settings: InferenceSettings) -> int:
    from pyvoy import PyvoyServer

    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    given = settings.model_dump(mode="json") | {"port": settings.port or _free_port(settings.host)}
    with tempfile.TemporaryDirectory(prefix="pollard-envoy-") as folder:
        control = str(Path(folder) / "control")
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        connected = loop.create_future()

        def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not connected.done():
                connected.set_result((reader, writer))

        listener = await asyncio.start_unix_server(connect, control)

        class Server(PyvoyServer):
            def get_envoy_config(self) -> dict[str, Any]:
                return _adjusted(super().get_envoy_config())

        envoy = Server(
            _APPLICATION,
            address=settings.host,
            port=given["port"],
            lifespan=True,
            additional_envoy_args=[
                # One thread for the connections: the models need the cores, and handing calls from
                # several threads to Python's one costs more than it brings.
                *("--concurrency", "1"),
                # Otherwise a piece of shared memory stays behind in /dev/shm after each start.
                "--disable-hot-restart",
            ],
            env={_SETTINGS: json.dumps(given), _CONTROL: control},
            stdout=None,
            stderr=None,
        )
        try:
            await envoy.start()
            reader, writer = await asyncio.wait_for(connected, _START_SECONDS)
        except Exception as error:
            await envoy.stop()
            raise StartupError(
                f"Envoy did not start on {settings.host}:{given['port']} ({error}); see its output "
                "above, or leave --frontend out"
            ) from error
        ended = asyncio.ensure_future(reader.read())
        asked = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        unasked = ended.done()
        if not unasked:
            writer.write(b"stop\n")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(ended), settings.grace_seconds + 10)
        ended.cancel()
        writer.close()
        await envoy.stop()
        listener.close()
    if unasked:
        _log.error("Envoy ended")
    return 1 if unasked else 0


def _adjusted(config: dict[str, Any]) -> dict[str, Any]:
    """Return pyvoy's configuration of Envoy, made fit for this server."""
    for listener in config["static_resources"]["listeners"]:
        # Otherwise a second server on the same port would silently share it.
        listener["enable_reuse_port"] = False
        for chain in listener.get("filter_chains", ()):
            for part in chain["filters"]:
                typed = part["typed_config"]
                if part["name"] != "envoy.filters.network.http_connection_manager":
                    continue
                # Streams may be quiet for as long as their clients like.
                typed["stream_idle_timeout"] = "0s"
                typed["request_timeout"] = "0s"
    return config


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class _Application:
    """What pyvoy finds: builds the server when Envoy starts, and hands calls to it."""

    def __init__(self) -> None:
        self._calls: GrpcApplication | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            assert self._calls is not None  # noqa: S101 - Envoy sends nothing before the start
            await self._calls(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start(json.loads(os.environ[_SETTINGS]))
        except Exception as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        while (await receive())["type"] != "lifespan.shutdown":
            pass
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self, given: Mapping[str, Any]) -> None:
        from pollard.services.common.telemetry import setup
        from pollard.services.inference.main import build

        settings = InferenceSettings.load(dict(given))
        setup.configure("inference", settings)
        fronts: list[EnvoyFront] = []

        def front(application: GrpcApplication) -> EnvoyFront:
            fronts.append(EnvoyFront(settings, application))
            return fronts[0]

        server = build(settings, front)
        self._calls = fronts[0].application
        reader, writer = await asyncio.open_unix_connection(os.environ[_CONTROL])

        async def live() -> None:
            try:
                await server.start()
                # The end of the stream says that the other process has gone without a word.
                await reader.readline()
                await server.stop(settings.grace_seconds)
            except Exception:
                _log.exception("the server failed")
            await asyncio.to_thread(setup.shut_down)
            writer.close()
            os.kill(os.getpid(), signal.SIGTERM)

        self._living = asyncio.create_task(live())


application = _Application()
