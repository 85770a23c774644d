"""The installed C++ client is found by CMake, and a program of others builds on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
VERSION = (ROOT / "VERSION").read_text().strip()
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


def test_a_project_fetches_the_client_as_its_page_says(builds: ModuleType, tmp_path: Path) -> None:
    if words := builds.LANGUAGES["cpp"].missing():
        pytest.skip(words)
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    # The repository as others see it: what the client needs, on the branch `main`.
    theirs, project = tmp_path / "repository", tmp_path / "project"
    shutil.copytree(ROOT / "clients" / "cpp", theirs / "clients" / "cpp")
    shutil.copytree(ROOT / "protos", theirs / "protos")
    shutil.copy(ROOT / "VERSION", theirs)
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    for command in (("init", "-b", "main"), ("add", "."), (*identity, "commit", "-m", "All")):
        done = run("git", *command, cwd=theirs)
        assert done.returncode == 0, done.stderr
    page = (ROOT / "clients" / "cpp" / "README.md").read_text()
    (block,) = re.findall(r"^```cmake\n(.*?)^```$", page, re.M | re.S)
    assert "https://github.com/pollard-ai/pollard.git" in block
    project.mkdir()
    (project / "main.cc").write_text(PROGRAM)
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\n"
        "project(my_program LANGUAGES CXX)\n"
        "add_executable(my_program main.cc)\n"
        + block.replace("https://github.com/pollard-ai/pollard.git", theirs.as_uri())
    )
    done = run("cmake", "-B", "build", cwd=project)
    assert done.returncode == 0, done.stderr
