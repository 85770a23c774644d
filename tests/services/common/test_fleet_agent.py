"""How servers are told where their managers are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("service", ["inference", "preprocess"])
@pytest.mark.parametrize("target", ["models", "one:8021,two", "http://one:8021"])
def test_a_manager_that_is_no_address_is_refused_at_the_start(
    tmp_path: Path, service: str, target: str
) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "pollard.client.cli", "serve", service, "--port", "0"),
            *("--manager", target, "--cache-dir", str(tmp_path / "cache")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert "must be HOST:PORT" in ended.stderr
    assert "--manager" in ended.stderr
    assert not (tmp_path / "cache").exists()
