"""`pollard drill swap` against services that run already."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pollard.client import ModelsClient, VisionClient
from pollard.runtime.bundle import Bundle
from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS

DRILL = [sys.executable, "-m", "pollard.client.cli", "drill", "swap"]
PIXELS = np.zeros((8, 8), np.uint8)


@pytest.mark.long
def test_an_installation_is_drilled_and_left_as_it_was(
    up: Any, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    def drill(*arguments: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
        figures = tmp_path / "figures.json"
        done = subprocess.run(
            [*DRILL, *arguments, "--json", str(figures)],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        return json.loads(figures.read_text()), done

    addresses = (
        *("--manager", up.address(MODELS), "--vision", up.address(PREPROCESS)),
        *("--inference", up.address(INFERENCE), "--clients", "2", "--pause", "0.1"),
        *("--load", "closed", "--swaps", "3"),
    )
    with ModelsClient(up.address(MODELS)) as models, VisionClient(up.address(PREPROCESS)) as vision:
        models.push(make_bundle(seed=1).path, "flowers", alias="production")
        models.push(make_bundle(seed=2, size=20).path, "flowers")
        # A model of its own, which is gone afterwards.
        found, done = drill(*addresses, "--model-mb", "1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert [model.name for model in models.models()] == ["flowers"]
        # One that is there: its revisions take images of different sizes, so only images are sent.
        found, done = drill("flowers", *addresses, "--revisions", "2,1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert found["swaps"] == 3
        assert models.wait_alias("flowers", "production", 1).revision == 1
        assert vision.predict(PIXELS, "flowers").revision == 1
        # Revisions that cannot be told apart prove nothing.
        models.push(make_bundle(seed=1).path, "twins", alias="production")
        models.push(make_bundle(seed=1, files={"note.txt": b"the same"}).path, "twins")
    _, done = drill("twins", *addresses)
    assert done.returncode == 1
    assert "can be told apart for 0 of" in done.stderr
