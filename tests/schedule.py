"""Which worker of pytest-xdist runs what, and when: what takes longest begins first.

    python tests/schedule.py build/test.xml build/long.xml    write what two runs measured

They are those of `make test` and `make long`, each with `--junit-xml`. Tests of one file stay
together, for they share servers; so do those of the folders that share one among their files. How
long each takes is in `seconds.json`, as far as it is worth telling: a file that is not in it comes
last. Without an order a worker may be left alone with the longest at the end.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
SECONDS = TESTS / "seconds.json"

TOGETHER = ("tests/contract/", "tests/services/inference/conformance/")
"""Folders whose files share a server that takes long to start."""

_WORTH_TELLING_SECONDS = 2.0


def unit_of(nodeid: str) -> str:
    """Return what a test stays together with: its file, or its folder."""
    file = nodeid.partition("::")[0]
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


def seconds(selected: str) -> dict[str, float]:
    """Return how long each unit took when it was measured last.

    Args:
        selected: The marks that pytest was asked for: of a unit, some tests may be long.
    """
    read: dict[str, dict[str, float]] = json.loads(SECONDS.read_text())
    return read.get(selected) or dict(sum((Counter(part) for part in read.values()), Counter()))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what takes longest first, where workers share the tests out."""
    if hasattr(config, "workerinput"):
        known = seconds(config.option.markexpr)
        items.sort(key=lambda item: -known.get(unit_of(item.nodeid), 0.0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out by units, in the order in which the workers have put them."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    config.option.loadscopereorder = False
    return ByUnit(config, log)


def measured(report: Path) -> dict[str, float]:
    """Return the seconds of each unit that a report in JUnit's form tells."""
    found: Counter[str] = Counter()
    files = {str(path.with_suffix("")).replace("/", "."): path for path in _files()}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):  # noqa: S314 - our own
        path = files.get(case.get("classname", ""))
        if path is not None:
            found[unit_of(str(path))] += float(case.get("time", "0"))
    return {
        unit: round(took, 1) for unit, took in found.most_common() if took >= _WORTH_TELLING_SECONDS
    }


def _files() -> list[Path]:
    return [path.relative_to(TESTS.parent) for path in TESTS.rglob("test_*.py")]


if __name__ == "__main__":
    reports = dict(zip(("not long", "long"), map(Path, sys.argv[1:]), strict=True))
    found = {selected: measured(report) for selected, report in reports.items()}
    SECONDS.write_text(json.dumps(found, indent=2) + "\n")
