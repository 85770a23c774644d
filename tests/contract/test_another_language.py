"""What the documentation says of languages without a client of their own, done as it is written."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "clients.md"


def block(language: str) -> str:
    """Return the page's one block in a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return str(found)


@pytest.fixture(scope="module")
def ruby(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the stubs that the page's commands make, and its program."""
    missing = [tool for tool in ("protoc", "ruby", "grpc_ruby_plugin") if not shutil.which(tool)]
    if missing or subprocess.run(["ruby", "-e", "require 'grpc'"], check=False).returncode:
        pytest.skip(
            "needs Ruby with gRPC; on Debian: apt-get install protobuf-compiler "
            "protobuf-compiler-grpc ruby-grpc"
        )
    directory = tmp_path_factory.mktemp("ruby")
    (directory / "protos").symlink_to(ROOT / "protos")
    subprocess.run(["sh", "-euc", block("sh")], cwd=directory, check=True)
    (directory / "predict.rb").write_text(block("ruby"))
    vectors = json.loads((Path(__file__).parent / "vectors" / "predict.json").read_text())
    image = vectors["cases"][0]["arguments"]["image_base64"]
    (directory / "image.png").write_bytes(base64.b64decode(image))
    return directory


def predict(directory: Path, address: str, model: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ruby", "-I", "gen", "predict.rb", address, "image.png", model],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_ruby_program_of_the_page_gets_an_answer(ruby: Path, live: Any) -> None:
    done = predict(ruby, live.address("preprocess"), "digits")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "two"


def test_it_gives_the_services_reason_for_an_error(ruby: Path, live: Any) -> None:
    done = predict(ruby, live.address("preprocess"), "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith("REVISION_UNKNOWN: there is no model 'nothing'"), done.stderr
