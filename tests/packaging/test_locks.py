"""What the services stand on is locked, by version and hash, and the locks are what was tested."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
KINDS = ("cpu", "gpu")
EXTRAS = {"postgres", "s3", "uris", "tracing"}


def lock(kind: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Return what a lock names, each with its hashes."""
    text = (ROOT / f"deploy/locks/{kind}.txt").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line.partition("--hash")[0].strip())
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})(?=\s|$)", line)
        found[canonicalize_name(requirement.name)] = requirement, hashes
    return found


def constrained() -> dict[str, str]:
    """Return the versions of `constraints.txt`."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.partition("==") for line in lines if "==" in line and line[0] != "#"]
    return {canonicalize_name(name): version.strip() for name, _, version in pins}


def needed(name: str, extras: set[str], seen: set[tuple[str, str]]) -> set[str]:
    """Return the distributions that one needs, here, with those that they need."""
    found: set[str] = set()
    for text in requires(name) or ():
        requirement = Requirement(text)
        marker = requirement.marker
        for extra in {"", *extras}:
            if marker is not None and not marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(requirement.name), ",".join(sorted(requirement.extras))
            if key not in seen:
                seen.add(key)
                found.add(key[0])
                found |= needed(requirement.name, requirement.extras, seen)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_one_has_the_version_that_was_tested_and_hashes(kind: str) -> None:
    pins = constrained()
    for name, (requirement, hashes) in lock(kind).items():
        assert hashes, f"{name} has no hash"
        [specifier] = requirement.specifier
        assert specifier.operator == "==", name
        # What is for other platforms only, or for GPUs, is not installed by the tests.
        elsewhere = requirement.marker is not None and not requirement.marker.evaluate()
        if name in pins or not (elsewhere or name.startswith(("nvidia-", "onnxruntime-gpu"))):
            assert specifier.version == pins[name], f"{name}: run `make lock`"


def test_nothing_that_the_services_need_is_missing() -> None:
    locked = lock("cpu")
    ours = {"pollard-protos", "pollard-runtime", "pollard-client", "pollard-services"}
    wanted = needed("pollard-services", {"cpu", *EXTRAS}, set()) - ours
    assert {"grpcio", "onnxruntime", "psycopg-binary"} <= wanted
    assert wanted <= set(locked), f"run `make lock`: {sorted(wanted - set(locked))}"
    assert "hatchling" in locked  # builds our own distributions


def test_the_kinds_differ_by_their_engine_only() -> None:
    cpu, gpu = ({name: str(found[0]) for name, found in lock(kind).items()} for kind in KINDS)
    assert set(cpu) - set(gpu) == {"onnxruntime"}
    assert all(name.startswith(("nvidia-", "onnxruntime-gpu")) for name in set(gpu) - set(cpu))
    assert {name: cpu[name] for name in cpu if name in gpu}.items() <= gpu.items()
    assert gpu["onnxruntime-gpu"].partition("==")[2] == cpu["onnxruntime"].partition("==")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_no_lock_says_where_packages_come_from(kind: str) -> None:
    text = (ROOT / f"deploy/locks/{kind}.txt").read_text()
    assert not re.search(r"://|^-|file:", text, re.MULTILINE)
