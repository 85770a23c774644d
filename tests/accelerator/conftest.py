"""Which device the tests of this folder run on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pretended
import pytest
import torch

DEVICE = os.environ.get("POLLARD_TEST_DEVICE", pretended.NAME)

# Processes that are begun here find the sources, too, where nothing is installed.
_SOURCES = [path for path in sys.path if path.endswith("/src")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_SOURCES, os.environ.get("PYTHONPATH", "")])

if pretended.NAME == DEVICE:
    pretended.register()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLLARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def device() -> str:
    """The device's name, as commands take it."""
    return DEVICE


@pytest.fixture
def tolerance() -> float:
    """How far, relative to them, results after some steps may be from the processor's."""
    return 1e-3 if pretended.NAME == DEVICE else 0.1


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(2)
