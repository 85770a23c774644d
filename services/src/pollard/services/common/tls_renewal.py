"""Certificates are read again when their files change; nothing here knows gRPC."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from pollard.services.common.errors import StartupError
from pollard.services.common.tls_expiry import Expiry
from pollard.services.common.tls_files import TlsFiles

_log = structlog.get_logger("pollard.tls")

T = TypeVar("T")


class Renewing(Generic[T]):
    """Holds what was made of a server's files, and makes it anew when they have changed."""

    def __init__(self, files: TlsFiles, load: Callable[[], T]) -> None:
        """Make it for the first time.

        Args:
            files: Certificate, key and authorities of clients are looked at.
            load: Makes it; raises StartupError if the files are of no use.

        Raises:
            StartupError: a file cannot be read, or `load` says so.
        """
        self._files = [
            file for file in (files.certificate, files.key, files.client_ca) if file is not None
        ]
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._look()
        self.current = load()
        """What was made last."""
        self._certificate = files.certificate
        self._expiry = self._look_at_expiry()

    def renew(self) -> T | None:
        """Return what has been made anew, or None if there is nothing new that can be used."""
        with self._lock:
            try:
                seen = self._look()
                if seen == self._seen:
                    if self._expiry is not None:
                        self._expiry.tell()
                    return None
                self._seen = seen
                self.current = self._load()
                self._expiry = self._look_at_expiry()
            except StartupError as error:
                _log.error("the new certificate is not used", error=str(error))
                return None
        _log.info("certificate renewed", file=str(self._files[0]))
        return self.current

    def _look_at_expiry(self) -> Expiry | None:
        return None if self._certificate is None else Expiry(self._certificate)

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        try:
            stats = [os.stat(file) for file in self._files]
        except OSError as error:
            raise StartupError(f"cannot read {error.filename}: {error.strerror}") from error
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)


def http_context(files: TlsFiles) -> ssl.SSLContext | None:
    """Return the context of a service's HTTP port; None for a plain one.

    Where clients are to be known, a certificate is asked for but not demanded: health is for
    everybody, and who asks for more is looked at by request.

    Raises:
        StartupError: a file cannot be read, or certificate and key do not belong together.
    """
    if files.certificate is None or files.key is None:
        return None
    renewing = Renewing(files, lambda: _context(files))
    first = renewing.current

    def choose(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        renewing.renew()
        connection.context = renewing.current

    # Called for every connection, also where the client names no server.
    first.sni_callback = choose
    return first


def _context(files: TlsFiles) -> ssl.SSLContext:
    assert files.certificate is not None  # noqa: S101 - looked at above
    assert files.key is not None  # noqa: S101
    read_pair(files.certificate, files.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["http/1.1"])
    if files.client_ca is not None:
        read_authorities(files.client_ca)
        context.load_verify_locations(cafile=files.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def read_pair(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Return the key and the chain, which belong together.

    Raises:
        StartupError: they do not, or cannot be read.
    """
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


def read_authorities(file: Path) -> bytes:
    """Return certificates of authorities.

    Raises:
        StartupError: the file cannot be read, or holds none.
    """
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
