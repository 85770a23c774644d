"""When a server's certificate ends, told before it does and when it has."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pollard.services.common.errors import StartupError

_log = structlog.get_logger("pollard.tls")

_DAY = 86_400.0

WARNED_DAYS = (14, 3, 1, 0)
"""Days before its end at which a certificate is told of, each once; 0: it has ended."""

_told: set[tuple[Path, float, int]] = set()
_lock = threading.Lock()


def ends(certificate: Path) -> float:
    """Return when the first certificate of a chain ends, in seconds since 1970.

    Raises:
        StartupError: the file cannot be read, or holds no certificates.
    """
    # It takes a tenth of a second, which servers without TLS need not wait for.
    from cryptography import x509

    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    except OSError as error:
        raise StartupError(f"cannot read {certificate}: {error.strerror}") from error
    except ValueError as error:
        raise StartupError(f"{certificate} holds no certificates as PEM") from error
    return min(each.not_valid_after_utc for each in chain).timestamp()


class Expiry:
    """The end of a certificate that is shown."""

    def __init__(self, certificate: Path) -> None:
        """Look at the certificate, and tell of it if its end is near.

        Raises:
            StartupError: as :func:`ends`.
        """
        self._certificate = certificate
        self._ends = ends(certificate)
        self.tell()

    def tell(self) -> None:
        """Log what has not been said yet; called for each connection, from any thread."""
        left = self._ends - time.time()
        if left > WARNED_DAYS[0] * _DAY:
            return
        stage = min(days for days in WARNED_DAYS if left <= days * _DAY)
        # gRPC's port and the one of HTTP show the same file.
        with _lock:
            key = (self._certificate, self._ends, stage)
            if key in _told:
                return
            _told.add(key)
        when = datetime.datetime.fromtimestamp(self._ends, datetime.UTC).isoformat(" ", "seconds")
        file = str(self._certificate)
        if stage == 0:
            _log.error("the certificate has expired: clients refuse it", file=file, ended=when)
        else:
            _log.warning("the certificate expires soon", file=file, ends=when)


class CertificateEnds(Collector):
    """The end of the certificate that is in the file now."""

    def __init__(self, certificate: Path | None) -> None:
        self._certificate = certificate

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "pollard_certificate_ends_timestamp_seconds",
            "When this service's certificate ends, in seconds since 1970; without TLS, nothing.",
            labels=[],
        )
        if self._certificate is not None:
            # Whoever reads it to show it has said so.
            with contextlib.suppress(StartupError):
                family.add_metric([], ends(self._certificate))
        yield family
