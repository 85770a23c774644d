"""What settings hold stays out of what is shown."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from pollard.services.common.errors import StartupError
from pollard.services.common.redact import without_secrets
from pollard.services.models.blobs import open_blobs
from pollard.services.models.database import make_database
from pollard.services.models.settings import ModelsSettings
from pollard.services.up.serve import as_toml

DATABASE = "postgresql://pollard:{}@127.0.0.1:1/registry?host=127.0.0.1&connect_timeout=2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://login.example.org/keys", "https://login.example.org/keys"),
        ("postgresql://u:s3cret@db/x", "postgresql://***@db/x"),
        ("postgresql://u:s3cr/e@t@db/x", "postgresql://***@db/x"),
        ("https://h/keys?a=1&api_token=s3cret&b=2", "https://h/keys?a=1&api_token=***&b=2"),
        ("postgresql:///x?user=u&password=s3cret", "postgresql:///x?user=u&password=***"),
        ("someone@example.org", "someone@example.org"),
        ("", ""),
    ],
)
def test_urls_lose_their_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_settings_are_printed_without_passwords() -> None:
    url = DATABASE.format("s3cret")
    settings = ModelsSettings(database_url=url, jwt_keys="https://u:s3cret@h/k", jwt_audience="p")
    printed = as_toml(settings)
    assert "***@127.0.0.1" in printed
    assert "***@h/k" in printed
    assert "s3cret" not in printed


@pytest.mark.parametrize(
    "start",
    [
        lambda folder: make_database(DATABASE.format("s3cret/b@se"), folder, "x").open(),
        lambda folder: make_database(DATABASE.format("s3cret"), folder, "x").open(),
        lambda folder: make_database("mysql://u:s3cret@h/d", folder, "x"),
        lambda folder: make_database("s3cret", folder, "x"),
        lambda folder: open_blobs("https://key:s3cret@bucket", "", folder),
    ],
)
def test_errors_of_settings_do_not_quote_secrets(
    start: Callable[[Path], object], tmp_path: Path
) -> None:
    """Nor do their causes, which POLLARD_DEBUG shows."""
    pytest.importorskip("psycopg")
    with pytest.raises(StartupError) as caught:
        start(tmp_path)
    told = "".join(traceback.format_exception(caught.value))
    # Without the lines of this file.
    told = "\n".join(line for line in told.splitlines() if "lambda folder" not in line)
    assert "s3cret" not in told
