"""Dashboard and alerts name only metrics that the services have, the documentation all of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import yaml
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from pollard.runtime.machine import Machine
from pollard.services.common.call_metrics import CallMetrics
from pollard.services.common.metrics import Metrics
from pollard.services.inference.engine import Engine
from pollard.services.inference.loader import Loader
from pollard.services.inference.metrics import EngineMetrics
from pollard.services.inference.options import EngineOptions
from pollard.services.models.metrics import families_of_manager
from pollard.services.preprocess.counts import Counts
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.metrics import PreprocessMetrics
from pollard.services.preprocess.snapshot import Current

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD = ROOT / "deploy/grafana/pollard.json"
OPERATIONS = ROOT / "docs/operations.md"

OURS = re.compile(r"(?:nv_|pollard_|grpc_server_)")
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
ADDED = {"le", "instance", "job"}
"""Labels that Prometheus adds, or every histogram has."""


@pytest.fixture
async def families() -> dict[str, Metric]:
    """Every family that a service may tell, by name, from the collectors themselves."""
    loader = Loader(Machine.detect(), EngineOptions())
    collectors: list[Collector] = [
        CallMetrics(),
        EngineMetrics(Engine(), loader),
        PreprocessMetrics(DecodePool(1), Current(), Counts()),
    ]
    found: list[Metric] = [*families_of_manager()]
    for collector in collectors:
        found += collector.collect()
    loader.close()
    found += Metrics("models").registry.collect()
    return {family.name: family for family in found}


def series(families: Mapping[str, Metric]) -> dict[str, set[str] | None]:
    """Names as queries use them, with the labels that each has; None where all are taken."""
    found: dict[str, set[str] | None] = {"up": None}
    for name, family in families.items():
        labels = getattr(family, "_labelnames", None)
        for suffix in SUFFIXES.get(family.type, [""]):
            found[name + suffix] = None if labels is None else {*labels, *ADDED}
    return found


def wrong_in(expression: str, known: Mapping[str, set[str] | None]) -> Iterable[str]:
    """What a query names that is not there."""
    if "label_values" in expression:
        expression = expression.replace("label_values(", "").replace(", model)", "{model=~'.'}")
    text = re.sub(r"\b(?:by|on|group_left)\s*\([^)]*\)", "", expression)
    for name, matchers in re.findall(r"\b([a-z][a-z0-9_]*)\b(?:\{([^}]*)\})?", _bare(text)):
        if not (OURS.match(name) or name.startswith("process_") or name == "up"):
            continue
        if name not in known:
            yield name
            continue
        labels = known[name]
        for label in re.findall(r"([a-z_]+)\s*[=!]", matchers):
            if labels is not None and label not in labels:
                yield f"{name}{{{label}}}"


def _bare(text: str) -> str:
    """The query without the words in its quotes, which may look like names."""
    return re.sub(r"\"[^\"]*\"|'[^']*'", '""', text)


def expressions() -> list[tuple[str, str]]:
    board = json.loads(DASHBOARD.read_text())
    found = [
        (panel["title"], target["expr"])
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    found += [
        (each["name"], each["query"]["query"])
        for each in board["templating"]["list"]
        if each["type"] == "query"
    ]
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        found += [(rule["alert"], rule["expr"]) for rule in group["rules"]]
    return found


async def test_dashboard_and_alerts_ask_for_what_is_told(families) -> None:
    known = series(families)
    asked = expressions()
    assert len(asked) > 40
    wrong = [f"{where}: {each}" for where, text in asked for each in wrong_in(text, known)]
    assert wrong == []
    # That the check sees what is wrong:
    assert list(wrong_in('rate(pollard_nothing_total{a="b"}[5m])', known)) == [
        "pollard_nothing_total"
    ]
    assert list(wrong_in('sum(pollard_rollouts{modle="b"})', known)) == ["pollard_rollouts{modle}"]


async def test_the_documentation_lists_every_metric(families) -> None:
    text = OPERATIONS.read_text()
    listed = set(re.findall(r"^\| `((?:nv_|pollard_|grpc_)[a-z_]+)`", text, re.MULTILINE))
    told = {
        name + ("_total" if family.type == "counter" else "")
        for name, family in families.items()
        if OURS.match(name)
    }
    assert listed == told


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules_and_they_fire_as_they_should() -> None:
    for arguments in (["check", "rules", ALERTS], ["test", "rules", ALERTS.with_name("tests.yml")]):
        done = subprocess.run(
            ["promtool", *arguments], capture_output=True, text=True, cwd=ALERTS.parent, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
