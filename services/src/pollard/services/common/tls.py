"""TLS of the services: the certificate that a server shows, and how it reaches other services.

Certificates are read again when their files change, so that renewing one needs no restart. A pair
that does not belong together – the moment between writing the one file and the other, or a mistake
– is told in the log, and connections go on with the pair before it.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc
import structlog

from pollard.services.common.errors import StartupError
from pollard.services.common.tls_files import TlsFiles

_log = structlog.get_logger("pollard.tls")


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials | None:
    """Return the credentials of a service's port; None for a plain one.

    Raises:
        StartupError: a file cannot be read, or certificate and key do not belong together.
    """
    if files.certificate is None or files.key is None:
        return None
    return _Renewing(files.certificate, files.key, files.client_ca).credentials()


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials | None:
    """Return the credentials of channels to other services; None for plain ones.

    Raises:
        StartupError: a file cannot be read, or certificate and key do not belong together.
    """
    if files.ca is None:
        return None
    key, chain = None, None
    if files.certificate is not None and files.key is not None:
        key, chain = _pair(files.certificate, files.key)
    return grpc.ssl_channel_credentials(_authorities(files.ca), key, chain)


def open_channel(
    address: str,
    tls: TlsFiles,
    options: Sequence[tuple[str, str | int]] = (),
) -> grpc.aio.Channel:
    """Open a channel to another service, by TLS if there are authorities to trust.

    Raises:
        StartupError: a file cannot be read.
    """
    credentials = channel_credentials(tls)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=list(options))
    named = [("grpc.ssl_target_name_override", tls.name)] if tls.name else []
    return grpc.aio.secure_channel(address, credentials, options=[*options, *named])


class _Renewing:
    """Gives each new connection the certificate that lies on the disk."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._lock = threading.Lock()
        self._seen = self._look()
        self._first = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """Return them; gRPC calls `_fetch` for each connection."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._fetch,  # type: ignore[arg-type]  # None goes on with the last, it says
            require_client_authentication=self._client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new configuration, or None to go on with the last; on a thread of gRPC."""
        with self._lock:
            try:
                seen = self._look()
                if seen == self._seen:
                    return None
                self._seen = seen
                renewed = self._load()
            except StartupError as error:
                _log.error("the new certificate is not used", error=str(error))
                return None
        _log.info("certificate renewed", file=str(self._certificate))
        return renewed

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        files = (self._certificate, self._key, self._client_ca)
        try:
            stats = [os.stat(file) for file in files if file is not None]
        except OSError as error:
            raise StartupError(f"cannot read {error.filename}: {error.strerror}") from error
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        pair = _pair(self._certificate, self._key)
        authorities = _authorities(self._client_ca) if self._client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([pair], authorities)


def _pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Return the key and the chain, which belong together."""
    found = _read(key), _read(certificate)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        why = (
            "the key does not belong to the certificate"
            if error.reason == "KEY_VALUES_MISMATCH"
            else "they are no certificate chain and key without a password, as PEM"
        )
        raise StartupError(f"{certificate} and {key} cannot be used: {why}") from error
    return found


def _authorities(file: Path) -> bytes:
    found = _read(file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cafile=file)
    except ssl.SSLError as error:
        raise StartupError(f"{file} holds no certificates as PEM") from error
    return found


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {file}: {error.strerror}") from error
