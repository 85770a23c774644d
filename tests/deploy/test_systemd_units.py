"""The systemd units, as systemd reads them, and what they run."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
PROGRAM = "/opt/pollard/bin/pollard"


def unit(file: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their capitals
    parser.read(file)
    return {name: dict(parser[name]) for name in parser.sections()}


def test_there_is_one_for_each_service() -> None:
    assert [file.stem for file in UNITS] == [
        "pollard-inference",
        "pollard-models",
        "pollard-preprocess",
    ]


def test_systemd_understands_them(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not here: apt-get install systemd")
    program = tmp_path / "pollard"
    program.symlink_to(sys.executable)
    for file in UNITS:
        (tmp_path / file.name).write_text(file.read_text().replace(PROGRAM, str(program)))
    files = [str(tmp_path / file.name) for file in UNITS]
    done = subprocess.run(
        [analyze, "verify", *files], capture_output=True, text=True, check=False, timeout=60
    )
    said = [line for line in done.stderr.splitlines() if "pollard" in line and "/run/" not in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
def test_what_they_start_is_understood_by_the_service(
    file: Path, settings_of: Callable[..., dict[str, Any]], would_listen: Callable[[Any], None]
) -> None:
    service = unit(file)["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert program == PROGRAM
    name = file.stem.removeprefix("pollard-")
    assert arguments[:2] == ["serve", name]
    here = [
        str(FOLDER / "pollard.toml") if word == "/etc/pollard/pollard.toml" else word
        for word in arguments
    ]
    found = settings_of(here, {})
    would_listen(found)
    assert float(service["TimeoutStopSec"]) > found["grace_seconds"]
    kept = found["store" if name == "models" else "cache_dir"]
    assert kept == f"/var/lib/{service['StateDirectory']}"
    assert service["EnvironmentFile"] == f"-/etc/pollard/{name}.env"
    # common/systemd.py is what tells it.
    assert service["Type"] == "notify"


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
def test_the_user_that_they_run_as_is_made(file: Path) -> None:
    made = [
        line.split()[1]
        for line in (FOLDER / "pollard.sysusers").read_text().splitlines()
        if line.startswith("u ")
    ]
    assert unit(file)["Service"]["User"] in made
