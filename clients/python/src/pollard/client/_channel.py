"""How channels are opened: addresses, limits, deadlines."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

DEFAULT_TIMEOUT_SECONDS = 30.0
"""Deadline of a request when the caller gives none."""

DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Largest message in either direction; the servers' default too."""

_LONGEST_SECONDS = 1e8
"""Of a deadline: three years. More than some 300, gRPC cannot reckon with: it takes them for the
past."""

MAX_CONNECTIONS = 64
"""Most channels of one client."""

DEFAULT_INFERENCE_ADDRESS = "127.0.0.1:8001"
DEFAULT_VISION_ADDRESS = "127.0.0.1:8011"
DEFAULT_MODELS_ADDRESS = "127.0.0.1:8021"


class ConnectionInvalid(ValueError):
    """What a client was given to connect with does not fit together."""


@dataclass(frozen=True)
class Tls:
    """An encrypted connection, and what the two sides show each other."""

    ca_file: str | os.PathLike[str] | None = None
    """PEM file of the authorities that a server's certificate may be signed by; None for those
    that gRPC trusts by itself."""
    certificate_file: str | os.PathLike[str] | None = None
    """PEM file of this client's own certificate chain, for servers that ask for one."""
    key_file: str | os.PathLike[str] | None = None
    """PEM file of the key that belongs to it."""

    def __post_init__(self) -> None:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ConnectionInvalid(
                "certificate_file and key_file are given together or not at all"
            )


def is_local(address: str) -> bool:
    """Say whether what is sent to an address stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    bare = address.removeprefix("ipv4:").removeprefix("ipv6:")
    return all(_is_loopback(part) for part in bare.split(","))


def _is_loopback(address: str) -> bool:
    host = address.rpartition("/")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_credentials(
    tls: Tls | None, token: str | None, address: str
) -> grpc.ChannelCredentials | None:
    """Return the credentials of a channel; None for a plain connection.

    Without TLS a token is not among them: `plain_token` says what is sent then.

    Raises:
        ConnectionInvalid: There is a token without TLS, which would show it to the network.
        OSError: A file cannot be read.
    """
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ConnectionInvalid("token must be printable ASCII, without spaces, and not empty")
    if tls is None:
        if token is not None and not is_local(address):
            raise ConnectionInvalid(
                f"a token is sent to {address} over TLS only; give tls=Tls(…) too, or, to a "
                "command, POLLARD_TLS_CA (without it, tokens go to this machine alone)"
            )
        return None
    made = grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca_file),
        private_key=_read(tls.key_file),
        certificate_chain=_read(tls.certificate_file),
    )
    if token is not None:
        made = grpc.composite_channel_credentials(made, grpc.access_token_call_credentials(token))
    return made


def plain_token(tls: Tls | None, token: str | None) -> tuple[str, str] | None:
    """Return the metadata with which a token goes over a connection that is not encrypted."""
    return ("authorization", f"Bearer {token}") if token is not None and tls is None else None


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


SPREADING = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # "" is the server in whole. One that cannot be asked, such as a balancer, counts as well.
        "healthCheckConfig": {"serviceName": ""},
    }
)
"""gRPC's service config that gives requests in turn to the servers that are there and well: each is
asked to tell when its health changes, and one that drains gets no more."""


def channel_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, *, spread: bool = False
) -> list[tuple[str, Any]]:
    """Return the options with which every channel is opened.

    Args:
        max_message_bytes: Largest message in either direction.
        spread: The address stands for several servers that take requests in turn.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # A server that restarts should be found again in a second, not in the default 20.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # A server that came back under another address is looked for as soon: gRPC asks for a name
        # only twice a minute otherwise.
        ("grpc.dns_min_time_between_resolutions_ms", 1000),
        # A connection whose other end has gone without a word: what was sent is given up after one
        # timeout, what was being answered after three, for a ping comes after twice the time.
        ("grpc.keepalive_time_ms", 5000),
        ("grpc.keepalive_timeout_ms", 5000),
        # That is for the kernel. The answer to a ping a busy process may owe for seconds; gRPC
        # waits a minute for it unless told otherwise.
        ("grpc.http2.ping_timeout_ms", 10000),
        # Otherwise only the first two pings are sent while nothing else is.
        ("grpc.http2.max_pings_without_data", 0),
        # A proxy from the environment must not come between a client and its services.
        ("grpc.enable_http_proxy", 0),
        # `_retrying` sends requests again. gRPC's own retries must not do so: from 1.83 on, a call
        # that meets a connection which is given up as soon as it stands is sent again without a
        # pause, and takes a gigabyte a second until its deadline.
        ("grpc.enable_retries", 0),
    ]
    if spread:
        options.append(("grpc.service_config", SPREADING))
    return options


def checked_address(address: str) -> str:
    """Return `address`, or raise ValueError when it is none that gRPC can dial.

    Known forms: "host:port", "[v6]:port", "unix:/path", several "1.2.3.4:port" with commas
    between, and "dns:///host:port" with other schemes of gRPC's.
    """
    text = address.strip()
    if "," in text and ":///" not in text:
        return _checked_list(text)
    if text.startswith(("http://", "https://", "grpc://")):
        raise ValueError(f"address {address!r} must be HOST:PORT, without a scheme")
    if text.startswith(("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:")):
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"address {address!r} must be HOST:PORT, such as 127.0.0.1:8001")
    return text


def _checked_list(text: str) -> str:
    """Return several addresses as one target: gRPC itself takes IP addresses of one kind."""
    bare = text.removeprefix("ipv4:").removeprefix("ipv6:")
    kinds = set()
    for part in bare.split(","):
        try:
            host, _, _ = checked_address(part).rpartition(":")
            kinds.add(f"ipv{ipaddress.ip_address(host.strip('[]')).version}")
        except ValueError:
            raise ValueError(
                f"{part.strip()!r} of the addresses {text!r} must be an IP address with a port; "
                "for names give one that resolves to all servers, as dns:///NAME:PORT"
            ) from None
    if len(kinds) > 1:
        raise ValueError(f"the addresses {text!r} must be all of IPv4 or all of IPv6")
    return f"{kinds.pop()}:{','.join(part.strip() for part in bare.split(','))}"


def is_several(address: str) -> bool:
    """Whether a checked address may stand for several servers."""
    return "," in address or address.startswith("dns:")


def checked_connections(connections: int) -> int:
    """Return the number of channels of a client, or raise ValueError."""
    if not 1 <= connections <= MAX_CONNECTIONS:
        raise ValueError(f"connections must be 1 to {MAX_CONNECTIONS}, not {connections}")
    return connections


def checked_timeout(timeout: float | None, default: float) -> float:
    """Return a deadline in seconds: there always is one."""
    chosen = default if timeout is None else timeout
    if not chosen > 0 or chosen == float("inf"):
        raise ValueError(f"timeout must be a finite number of seconds above 0, not {timeout}")
    return min(chosen, _LONGEST_SECONDS)
