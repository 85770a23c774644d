"""What `pollard up` starts: directories, ports, and the command line of each service."""

from __future__ import annotations

import atexit
import errno
import os
import random
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pollard.services.common.errors import StartupError
from pollard.services.common.settings_file import read_tables
from pollard.services.common.tls_files import PLAIN, TlsFiles
from pollard.services.up import balancer

INFERENCE, PREPROCESS, MODELS = "inference", "preprocess", "models"
BALANCER = "balancer"
"""Envoy in front of several inference servers."""

STOP_ORDER = (PREPROCESS, INFERENCE, BALANCER, MODELS)
"""Who depends on whom, first the one that nobody depends on; but the balancer passes on the answers
of the inference servers until these have given their last."""

_BETWEEN_REPLICAS = 100
"""The second replica's port is so much above the first one's."""

_OFFSETS = {INFERENCE: 1, PREPROCESS: 11, MODELS: 21}

_LAST_PORT = 65535

# Below the range from which Linux takes the ports of outgoing connections, so that none of those
# can take a port between its choice and its use, or while a service is started again.
_FREE_PORTS = range(20000, 32000)

_held: dict[int, socket.socket] = {}
"""Free ports that this process has chosen, kept from others who look for one until it ends."""


@atexit.register
def _let_go() -> None:
    for holder in _held.values():
        holder.close()


@dataclass(frozen=True)
class UpOptions:
    """What `pollard up` can be told."""

    data_dir: Path | None = None
    """Registry, bundles and caches; None for the user's state directory."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port_base: int = 8000
    """The ports are this plus 1, 11 and 21; 0 takes free ones."""
    inference_port: int | None = None
    """0 takes a free one; None follows `port_base`."""
    preprocess_port: int | None = None
    """0 takes a free one; None follows `port_base`."""
    models_port: int | None = None
    """0 takes a free one; None follows `port_base`."""
    insecure: bool = False
    """Allow an address that is not loopback though nobody has to show anything."""
    tokens: bool = False
    """Let only those in who show a token; the first ones are made."""
    tls: TlsFiles = PLAIN
    """How the services speak TLS, with others and among themselves."""
    config: Path | None = None
    """TOML file with the services' settings."""
    ready_file: Path | None = None
    """Where to write addresses and pids, as JSON."""
    start_timeout_seconds: float = 60.0
    """How long all services may take to be healthy."""
    grace_seconds: float = 10.0
    """How long requests in flight may take to end."""
    replicas: int = 1
    """Inference servers."""
    balance: bool = False
    """Put Envoy on the inference port, and the replicas behind it."""
    hang_seconds: float = 20.0
    """How long a service may leave health checks unanswered before it is started again; 0 for
    ever."""
    quiet: bool = False
    """Only write warnings and errors."""


@dataclass(frozen=True)
class ServicePlan:
    """One service to be started."""

    name: str
    """"inference", "preprocess" or "models"; "inference-2" and so on for further replicas."""
    host: str
    """Address that it listens on."""
    port: int
    """Port that it listens on."""
    arguments: tuple[str, ...]
    """Arguments of `pollard serve SERVICE`, or of Envoy."""
    http_port: int = 0
    """Port of health and metrics over HTTP; 0 where there is none, or the file says which."""

    @property
    def service(self) -> str:
        """ "inference", "preprocess", "models" or "balancer"."""
        return self.name.partition("-")[0]

    @property
    def address(self) -> str:
        """Target under which this machine reaches it."""
        host = self.dialled
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def dialled(self) -> str:
        """Address under which this machine reaches it, without the port."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - compared, not bound

    def command(self) -> list[str]:
        """Return the command line of its process, for a child of this process."""
        child = [sys.executable, "-m", "pollard.services.up.child", str(os.getpid())]
        return [*child, self.service, *self.arguments]


def default_data_dir() -> Path:
    """Return where data lies when nobody says: the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "pollard"


def first_tokens(data_dir: Path) -> Path:
    """Return the directory of the tokens that the manager makes at the first start."""
    return data_dir / MODELS / "tokens"


def make_plan(options: UpOptions) -> tuple[Path, list[ServicePlan]]:
    """Choose directories and ports; return the data directory and the services.

    The manager comes first, then the inference servers, then preprocess.

    Raises:
        StartupError: A port is in use, or the directory cannot be made.
    """
    data_dir = (options.data_dir or default_data_dir()).expanduser().absolute()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"cannot make the data directory {data_dir}: {error.strerror}; choose another with "
            "--data-dir"
        ) from error
    settings = read_tables(options.config) if options.config is not None else {}
    ports = _choose_ports(options)
    plans = {name: ServicePlan(name, options.host, port, ()) for name, port in ports.items()}
    manager = plans[MODELS].address
    common: list[str] = ["--host", options.host, "--grace-seconds", str(options.grace_seconds)]
    if options.insecure:
        common.append("--insecure")
    if options.config is not None:
        common += ["--config", str(options.config.absolute())]
    common += _tls_arguments(options.tls)
    if options.tokens:
        server = first_tokens(data_dir) / "server.token"
        common += ["--tokens", "--token-file", str(server)]
    together: list[str] = []
    if options.replicas > 1:
        together = ["--replicas", str(options.replicas)]
        together += ["--replicas-dir", str(data_dir / "replicas")]

    def own(plan: ServicePlan) -> list[str]:
        if plan.service == MODELS:
            return ["--store", str(data_dir / MODELS)]
        told = ["--manager", manager, "--cache-dir", str(data_dir / plan.name)]
        return told + together if plan.service == INFERENCE else told

    replicas = [plan for plan in plans.values() if plan.service == INFERENCE]
    made = [
        replace(plan, arguments=(*common, "--port", str(plan.port), *own(plan)))
        for plan in (plans[MODELS], *replicas, plans[PREPROCESS])
    ]
    made = _with_http_ports(made, settings, {plan.port for plan in plans.values()})
    if options.balance:
        if options.tls.certificate is not None:
            raise StartupError(
                "--balance and TLS exclude each other: the balancer does not speak it yet. Leave "
                "--balance out and let clients open a channel to each replica"
            )
        balancer.envoy_path()
        front = plans[BALANCER]
        behind = [(plan.dialled, plan.port) for plan in replicas]
        made.append(
            replace(front, arguments=tuple(balancer.arguments(front.host, front.port, behind)))
        )
    return data_dir, made


def _with_http_ports(
    plans: list[ServicePlan], settings: Mapping[str, Mapping[str, Any]], taken: set[int]
) -> list[ServicePlan]:
    """Give each service the port after its own for HTTP, or a free one where that is in use."""
    made = []
    for plan in plans:
        if "http_port" in settings.get(plan.service, {}):
            made.append(plan)
            continue
        port = plan.port + 1
        if port in taken or port > _LAST_PORT or not _usable(plan, port):
            port = _free_port(plan.host, taken)
        taken = {*taken, port}
        arguments = (*plan.arguments, "--http-port", str(port))
        made.append(replace(plan, arguments=arguments, http_port=port))
    return made


def _tls_arguments(tls: TlsFiles) -> list[str]:
    if (tls.certificate is None) != (tls.key is None):
        raise StartupError("--tls-certificate and --tls-key are given together or not at all")
    if tls.certificate is not None and tls.ca is None:
        raise StartupError(
            "--tls-certificate needs --tls-ca, the authority that signed it: the services reach "
            "each other by TLS too, and must know whom to trust"
        )
    if tls.certificate is None and (tls.ca is not None or tls.client_ca is not None):
        raise StartupError("--tls-ca and --tls-client-ca need --tls-certificate and --tls-key")
    arguments: list[str] = []
    for flag, file in (
        ("--tls-certificate", tls.certificate),
        ("--tls-key", tls.key),
        ("--tls-client-ca", tls.client_ca),
        ("--tls-ca", tls.ca),
    ):
        if file is not None:
            arguments += [flag, str(file.absolute())]
    if tls.name:
        arguments += ["--tls-name", tls.name]
    return arguments


def _choose_ports(options: UpOptions) -> dict[str, int]:
    wanted = {
        name: (0 if options.port_base == 0 else options.port_base + _OFFSETS[name])
        if given is None
        else given
        for name, given in (
            (INFERENCE, options.inference_port),
            (PREPROCESS, options.preprocess_port),
            (MODELS, options.models_port),
        )
    }
    first = wanted[INFERENCE]
    if options.balance:
        # It has the port that clients know.
        wanted[BALANCER] = first
        first = wanted[INFERENCE] = first + _BETWEEN_REPLICAS if first else 0
    for number in range(2, options.replicas + 1):
        wanted[f"{INFERENCE}-{number}"] = first + (number - 1) * _BETWEEN_REPLICAS if first else 0
    if max(wanted.values()) > _LAST_PORT:
        raise StartupError(
            f"{options.replicas} replicas take the ports from {wanted[INFERENCE]} on in steps of "
            f"{_BETWEEN_REPLICAS}, which goes beyond {_LAST_PORT}; choose a lower "
            "--inference-port, or 0 for free ones"
        )
    fixed = [port for port in wanted.values() if port]
    if len(set(fixed)) != len(fixed):
        raise StartupError(
            "two services cannot share a port: "
            + ", ".join(f"{name} {port}" for name, port in wanted.items())
        )
    chosen: dict[str, int] = {}
    for name, port in wanted.items():
        if port:
            _check_port(name, options.host, port)
            chosen[name] = port
        else:
            chosen[name] = _free_port(options.host, {*fixed, *chosen.values()})
    return chosen


def _check_port(name: str, host: str, port: int) -> None:
    problem = _cannot_bind(host, port)
    if problem is None:
        return
    if problem.errno == errno.EADDRINUSE:
        raise StartupError(
            f"port {port} on {host}, wanted for {name}, is in use, perhaps by another `pollard "
            f"up`; stop the other program, or choose other ports with --port-base or "
            f"--{name.partition('-')[0].replace(BALANCER, INFERENCE)}-port (0 takes a free one)"
        )
    raise StartupError(f"cannot listen on {host}:{port} for {name}: {problem.strerror or problem}")


def _free_port(host: str, taken: set[int]) -> int:
    for port in random.sample(_FREE_PORTS, 200):
        if port not in taken and _hold(host, port):
            return port
    problem = _cannot_bind(host, 0)
    raise StartupError(f"found no free port on {host}: {problem or 'all that were tried are used'}")


def _usable(plan: ServicePlan, port: int) -> bool:
    """Tell whether a service can have the port beside its own."""
    if plan.port in _held:
        return _hold(plan.host, port)
    return _cannot_bind(plan.host, port) is None


def _hold(host: str, port: int) -> bool:
    """Take a port for a child of this process, if nobody has it.

    A socket that is bound and does not listen is in the way of whoever looks for a free port, but
    not of a server: servers may reuse an address on which nobody listens.
    """
    try:
        family, kind, protocol, _, address = _resolved(host, port)
        holder = socket.socket(family, kind, protocol)
    except OSError:
        return False
    try:
        holder.bind(address)
    except OSError:
        holder.close()
        return False
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _held[port] = holder
    return True


def _resolved(host: str, port: int) -> tuple[Any, Any, int, str, Any]:
    return socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]


def _cannot_bind(host: str, port: int) -> OSError | None:
    """Try to bind; return why it cannot be done."""
    try:
        family, kind, protocol, _, address = _resolved(host, port)
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC binds: connections of a server that has just stopped may linger.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error
    return None
