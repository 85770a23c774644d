"""When a server's certificate ends, told before it does and when it has."""

from __future__ import annotations

import datetime
import math
import threading
import time
from pathlib import Path

import structlog

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

        One whose end cannot be read is shown all the same, if it can be: it is told once.
        """
        self._certificate = certificate
        try:
            self._ends = ends(certificate)
        except StartupError as error:
            self._ends = math.inf
            _log.warning("when the certificate ends is not known", error=str(error))
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
