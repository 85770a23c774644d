"""The installed C++ client is found by CMake, and a program of others builds on it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]

VERSION = (Path(__file__).resolve().parents[2] / "VERSION").read_text().strip()
MAJOR, MINOR = (int(part) for part in VERSION.split(".")[:2])

PROJECT = """\
cmake_minimum_required(VERSION 3.16)
project(theirs LANGUAGES CXX)
find_package(pollard {version} REQUIRED)
add_executable(theirs main.cc)
target_link_libraries(theirs PRIVATE pollard::client)
"""

PROGRAM = """\
#include <iostream>

#include <pollard/client.h>

int main(int, char** arguments) {
  const pollard::ModelsClient models(arguments[1]);
  for (const auto& model : models.List()) std::cout << model.name << '\\n';
}
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def prefix(builds: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the client is installed."""
    cpp = builds.LANGUAGES["cpp"]
    if words := cpp.missing():
        pytest.skip(words)
    cpp.build()
    directory: Path = tmp_path_factory.mktemp("installed")
    done = run("cmake", "--install", builds.BUILD / "cpp", "--prefix", directory, cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


def configure(folder: Path, prefix: Path, version: str) -> subprocess.CompletedProcess[str]:
    (folder / "CMakeLists.txt").write_text(PROJECT.format(version=version))
    (folder / "main.cc").write_text(PROGRAM)
    return run("cmake", "-B", "build", f"-DCMAKE_PREFIX_PATH={prefix}", cwd=folder)


def test_a_program_is_built_on_the_installed_package(
    prefix: Path, live: Any, tmp_path: Path
) -> None:
    done = configure(tmp_path, prefix, f"{MAJOR}.{MINOR}")
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", "build", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    done = run(tmp_path / "build" / "theirs", live.address("models"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout.split()


def test_a_version_that_does_not_fit_is_refused(prefix: Path, tmp_path: Path) -> None:
    wanted = f"{MAJOR}.{MINOR + 1}"
    done = configure(tmp_path, prefix, wanted)
    assert done.returncode != 0
    assert f'compatible with requested version "{wanted}"' in " ".join(done.stderr.split())
