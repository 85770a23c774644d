"""TLS of the services: the certificate that a server shows, and how it reaches other services.

Certificates are read again when their files change, so that renewing one needs no restart. A pair
that does not belong together – the moment between writing the one file and the other, or a mistake
– is told in the log, and connections go on with the pair before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from pollard.services.common.tls_files import TlsFiles
from pollard.services.common.tls_renewal import Renewing, read_authorities, read_pair

_ALWAYS: list[tuple[str, str | int]] = [
    # Whoever opens a channel here tries again by himself. gRPC's own retries must not do so: from
    # 1.83 on, a call that meets a connection which is given up as soon as it stands is sent again
    # without a pause, takes a gigabyte a second, and may never end (tests/services/common).
    ("grpc.enable_retries", 0),
    # A proxy from the environment must not come between the services.
    ("grpc.enable_http_proxy", 0),
    # One that came back under another address is found soon: gRPC asks for a name only twice a
    # minute otherwise.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
]


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials | None:
    """Return the credentials of a service's port; None for a plain one.

    Raises:
        StartupError: a file cannot be read, or certificate and key do not belong together.
    """
    if files.certificate is None or files.key is None:
        return None
    certificate, key, client_ca = files.certificate, files.key, files.client_ca

    def load() -> grpc.ServerCertificateConfiguration:
        authorities = read_authorities(client_ca) if client_ca is not None else None
        return grpc.ssl_server_certificate_configuration([read_pair(certificate, key)], authorities)

    renewing = Renewing(files, load)
    return grpc.dynamic_ssl_server_credentials(
        renewing.current,
        # For each connection, on a thread of gRPC.
        renewing.renew,  # type: ignore[arg-type]  # None goes on with the last, it says
        require_client_authentication=client_ca is not None,
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials | None:
    """Return the credentials of channels to other services; None for plain ones.

    Raises:
        StartupError: a file cannot be read, or certificate and key do not belong together.
    """
    if files.ca is None:
        return None
    key, chain = None, None
    if files.certificate is not None and files.key is not None:
        key, chain = read_pair(files.certificate, files.key)
    return grpc.ssl_channel_credentials(read_authorities(files.ca), key, chain)


def open_channel(
    address: str,
    tls: TlsFiles,
    options: Sequence[tuple[str, str | int]] = (),
) -> grpc.aio.Channel:
    """Open a channel to another service, by TLS if there are authorities to trust.

    gRPC sends nothing again on it: who calls does that.

    Raises:
        StartupError: a file cannot be read.
    """
    credentials = channel_credentials(tls)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=[*_ALWAYS, *options])
    named = [("grpc.ssl_target_name_override", tls.name)] if tls.name else []
    return grpc.aio.secure_channel(address, credentials, options=[*_ALWAYS, *options, *named])
