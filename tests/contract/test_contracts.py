"""The checks on the contracts themselves: lint, breaking changes, code generation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _buf() -> str:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed (pip install buf-bin)")
    return buf


def test_contracts_pass_the_lint() -> None:
    done = subprocess.run([_buf(), "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contracts_are_formatted() -> None:
    command = [_buf(), "format", "--diff", "--exit-code"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contracts_break_nothing_since_the_last_release() -> None:
    tag = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0", "--match", "v*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if not tag:
        pytest.skip("there is no release tag yet, so the contracts may still change")
    done = subprocess.run(
        [_buf(), "breaking", "--against", f".git#tag={tag}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_contract_imports_the_inference_package() -> None:
    # It lives in a descriptor pool of its own, where no other contract can see it.
    for path in (ROOT / "protos" / "pollard").rglob("*.proto"):
        assert 'import "inference/' not in path.read_text(encoding="utf-8"), path


def test_no_namespace_package_has_an_init() -> None:
    found = [p for p in ROOT.glob("*/**/src/pollard/__init__.py") if ".venv" not in p.parts]
    assert found == []
