"""The examples of the page about the Python clients run as they stand, against live services."""

from __future__ import annotations

import base64
import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.M | re.S
)


@pytest.fixture(scope="module")
def folder(live: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the examples name."""
    directory = tmp_path_factory.mktemp("page")
    vectors = json.loads((Path(__file__).parent / "vectors" / "predict.json").read_text())
    image = base64.b64decode(vectors["cases"][0]["arguments"]["image_base64"])
    (directory / "seven.png").write_bytes(image)
    (directory / "frames").mkdir()
    for number in range(3):
        (directory / "frames" / f"{number}.png").write_bytes(image)
    (directory / "ca.pem").write_bytes(b"")  # no connection is made with it
    for number, name in enumerate(("my-bundle", "better-bundle")):
        shutil.copytree(live.bundles[number], directory / name)
    return directory


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_of_the_page_runs(
    block: str,
    live: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    for port, service in (("8001", "inference"), ("8011", "preprocess"), ("8021", "models")):
        block = block.replace(f'"127.0.0.1:{port}"', repr(live.address(service)))
    program = folder / "example.py"
    program.write_text(block)
    runpy.run_path(str(program))
    if "print(" in block:
        assert capsys.readouterr().out
