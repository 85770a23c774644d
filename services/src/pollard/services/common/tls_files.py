"""Which files TLS of a service is made of; settings name them, and import nothing of gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one service."""

    certificate: Path | None = None
    """Its chain; shown to who connects, and to services that ask for one. None listens without
    TLS."""
    key: Path | None = None
    """The key that belongs to it."""
    client_ca: Path | None = None
    """Authorities one of which must have signed the certificate of whoever connects; None asks for
    none."""
    ca: Path | None = None
    """Authorities of the services that are connected to; None connects without TLS."""
    name: str = ""
    """Name that their certificates carry, when they are reached under another."""

    @property
    def knows_clients(self) -> bool:
        """Whether only those get in whom an authority has signed."""
        return self.certificate is not None and self.client_ca is not None


PLAIN = TlsFiles()
"""No TLS at all."""
