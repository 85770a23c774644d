"""How commands connect, which the environment says: secrets do not belong into command lines."""

from __future__ import annotations

import os
from typing import TypedDict

from pollard.client._channel import ConnectionInvalid, Tls

CA, CERTIFICATE, KEY, TOKEN = (
    "POLLARD_TLS_CA",
    "POLLARD_TLS_CERTIFICATE",
    "POLLARD_TLS_KEY",
    "POLLARD_TOKEN",
)


class Connection(TypedDict):
    """Arguments of every client."""

    tls: Tls | None
    token: str | None


def connection() -> Connection:
    """Return what the environment says.

    `POLLARD_TLS_CA` names the PEM file of the authorities that a server's certificate may be signed
    by, and turns TLS on; `system` stands for those that gRPC trusts by itself.
    `POLLARD_TLS_CERTIFICATE` and `POLLARD_TLS_KEY` are shown to servers that ask for them,
    `POLLARD_TOKEN` is sent with every call; without TLS, clients send it to this machine only.

    Raises:
        ConnectionInvalid: a certificate is given without its key or the authorities.
    """
    authorities = os.environ.get(CA)
    certificate, key = os.environ.get(CERTIFICATE), os.environ.get(KEY)
    token = os.environ.get(TOKEN)
    if not authorities:
        lonely = [name for name, value in ((CERTIFICATE, certificate), (KEY, key)) if value]
        if lonely:
            raise ConnectionInvalid(
                f"{lonely[0]} is set, and {CA} is not: name the PEM file of the servers' "
                "authorities there, or `system` for those that are generally trusted"
            )
        return Connection(tls=None, token=token or None)
    if bool(certificate) != bool(key):
        given, missing = (CERTIFICATE, KEY) if certificate else (KEY, CERTIFICATE)
        raise ConnectionInvalid(
            f"{given} is set, and {missing} is not: a certificate and its key are given "
            "together or not at all"
        )
    tls = Tls(
        ca_file=None if authorities == "system" else authorities,
        certificate_file=certificate or None,
        key_file=key or None,
    )
    return Connection(tls=tls, token=token or None)


def variable_of(file: str) -> str:
    """Return the variable that names a file; empty if none does."""
    return next((name for name in (CA, CERTIFICATE, KEY) if os.environ.get(name) == file), "")
