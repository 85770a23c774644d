"""When a certificate ends, and what is said of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pollard.services.common.errors import StartupError
from pollard.services.common.metrics import Metrics
from pollard.services.common.tls_expiry import Expiry, ends
from pollard.services.common.tls_files import TlsFiles
from pollard.services.common.tls_renewal import Renewing, read_pair


def value(certificate: Path | None) -> float | None:
    metrics = Metrics("models", certificate=certificate)
    return metrics.registry.get_sample_value("pollard_certificate_ends_timestamp_seconds")


def test_the_first_of_a_chain_to_end_counts(make_authority: Any) -> None:
    ours = make_authority("ours")
    certificate, _ = ours.issue("server", days=20)
    other, _ = ours.issue("other", days=10)
    alone = ends(certificate)
    assert alone == pytest.approx(time.time() + 20 * 86_400, abs=60)
    certificate.write_bytes(certificate.read_bytes() + other.read_bytes())
    assert ends(certificate) == pytest.approx(alone - 10 * 86_400, abs=60)
    assert value(certificate) == ends(certificate)


@pytest.mark.parametrize(
    ("days", "words"),
    [(15, ""), (13, "expires soon"), (0.5, "expires soon"), (-1, "has expired: clients refuse it")],
)
def test_it_is_said_once(make_authority: Any, capsys: Any, days: float, words: str) -> None:
    certificate, _ = make_authority("ours").issue("server", days=days)
    for _ in range(2):
        expiry = Expiry(certificate)
        expiry.tell()
    said = capsys.readouterr().out
    assert said.count("the certificate") == (1 if words else 0)
    assert words in said


def test_one_whose_end_cannot_be_read_is_no_reason_not_to_show_it(
    make_authority: Any, capsys: Any
) -> None:
    # OpenSSL takes this kind of PEM, too.
    certificate, key = make_authority("ours").issue("server", days=10)
    renewing = Renewing(TlsFiles(certificate, key), lambda: read_pair(certificate, key))
    trusted = certificate.read_text().replace(" CERTIFICATE", " TRUSTED CERTIFICATE")
    certificate.write_text(trusted)
    assert renewing.renew() == (key.read_bytes(), trusted.encode())
    assert renewing.renew() is None
    said = capsys.readouterr().out
    assert said.count("when the certificate ends is not known") == 1
    assert "certificate renewed" in said
    assert value(certificate) is None


def test_what_is_no_certificate_is_told_and_has_no_metric(tmp_path: Path) -> None:
    nonsense = tmp_path / "server.pem"
    for content, words in ((None, "cannot read"), ("nothing", "holds no certificates")):
        if content is not None:
            nonsense.write_text(content)
        with pytest.raises(StartupError, match=words):
            ends(nonsense)
        assert value(nonsense) is None
    assert value(None) is None
