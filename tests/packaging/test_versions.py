from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = ("protos/python", "runtime", "clients/python", "services", "compression")


def project(folder: str) -> dict:
    return tomllib.loads((REPOSITORY / folder / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place():
    for folder in DISTRIBUTIONS:
        text = (REPOSITORY / folder / "pyproject.toml").read_text()
        assert "version" not in project(folder)
        path = tomllib.loads(text)["tool"]["hatch"]["version"]["path"]
        assert (REPOSITORY / folder / path).resolve() == REPOSITORY / "VERSION"


def test_distributions_ask_for_each_other_at_the_same_version():
    version = (REPOSITORY / "VERSION").read_text().strip()
    for folder in DISTRIBUTIONS:
        described = project(folder)
        wanted = described["dependencies"] + [
            item for extra in described.get("optional-dependencies", {}).values() for item in extra
        ]
        for item in wanted:
            if item.startswith("pollard-"):
                assert item.endswith(f"=={version}"), (folder, item)


def test_onnxruntime_is_only_an_extra():
    for folder in DISTRIBUTIONS:
        assert not [
            item for item in project(folder)["dependencies"] if item.startswith("onnxruntime")
        ]
    extras = project("runtime")["optional-dependencies"]
    assert extras["cpu"][0].startswith("onnxruntime>")
    assert extras["gpu"][0].startswith("onnxruntime-gpu>")


@pytest.mark.parametrize(
    ("manifest", "pattern"),
    [
        ("clients/typescript/package.json", r'^  "version": "([^"]+)"'),
        ("clients/cpp/CMakeLists.txt", r"^project\(pollard_client VERSION ([\d.]+)"),
        ("clients/java/pom.xml", r"^  <version>([^<]+)</version>"),
    ],
)
def test_the_clients_in_other_languages_have_the_version(manifest: str, pattern: str) -> None:
    found = re.search(pattern, (REPOSITORY / manifest).read_text(), re.M)
    assert found is not None
    assert found[1] == (REPOSITORY / "VERSION").read_text().strip()
