"""Searches on a Ray cluster of two nodes, made here; without Ray most of these are skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pollard.compress import cluster_trials
from pollard.compress.cluster_trials import ClusterTrials, Kit, pack
from pollard.compress.errors import CompressionError, PruneFailed, UsageInvalid
from pollard.compress.pipeline import compress
from pollard.compress.recipe import Recipe
from pollard.compress.search import Found, Outcome, Point, search
from pollard.compress.search_trials import Setting

pytestmark = pytest.mark.timeout(600)

MEMORY = 100 << 20
"""Of each node's object store, in bytes."""


@pytest.fixture(scope="module")
def make_cluster() -> Iterator[Callable[[], Any]]:
    """Returns a function that starts a cluster of two nodes with a core each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.40'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
    from ray.cluster_utils import Cluster

    made: list[Any] = []

    def make() -> Any:
        how = {"num_cpus": 1, "object_store_memory": MEMORY}
        cluster = Cluster(initialize_head=True, head_node_args={**how, "include_dashboard": False})
        made.append(cluster)
        cluster.add_node(**how)
        return cluster

    yield make
    for cluster in made:
        cluster.shutdown()


@pytest.fixture(scope="module")
def address(make_cluster: Callable[[], Any]) -> str:
    """Of a cluster that the tests share."""
    return str(make_cluster().address)


def outcome_of(point: Point) -> Outcome:
    return Outcome("pruned-fp32", point.latency, 1 / point.latency, 10, 10, 0.0)


def points(found: Found) -> list[tuple[int, Point]]:
    return [(trial.number, trial.point) for trial in found.trials]


def test_a_search_finds_the_same_with_ray_as_without(
    address: str, digits_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One table of latencies for both, as one machine has it.
    monkeypatch.setenv("POLLARD_CACHE", str(tmp_path / "cache"))
    recipe = Recipe(
        "zoo:small-cnn-28", "digits", str(digits_parent), "cpu-fp32", search=3, epochs=1,
        batch_size=64, max_drop=60.0, threads=1,
    )  # fmt: skip
    found = [
        compress(recipe, tmp_path / f"out{n}", cache=tmp_path / f"stages{n}", ray=ray).report[
            "search"
        ]["trials"]
        for n, ray in enumerate(("", address))
    ]
    for here, there in zip(*found, strict=True):
        assert here["point"] == there["point"]
        for name in ("drop_points", "macs", "size_bytes"):
            assert here["outcome"][name] == there["outcome"][name]
        assert 0 < there["outcome"]["latency"] < 1


def test_a_node_that_is_lost_costs_its_trials_and_not_the_search(
    make_cluster: Callable[[], Any], tmp_path: Path
) -> None:
    cluster = make_cluster()
    notes = str(tmp_path / "notes")
    os.mkdir(notes)
    head = cluster.head_node.node_id
    [victim] = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]

    # Within the test, so that it goes to the nodes by value.
    def trial(kit: Any, point: Point) -> Outcome:
        import os
        import time

        import ray

        node = ray.get_runtime_context().get_node_id()
        with open(f"{notes}/{point.latency:.6f}-{node}", "w"):
            pass
        while node != head and os.path.exists(notes):
            time.sleep(0.1)
        return outcome_of(point)

    trials = ClusterTrials(cluster.address, None, 8, run=trial)  # type: ignore[arg-type]

    def kill() -> None:
        while not any(name.endswith(victim.node_id) for name in os.listdir(notes)):
            time.sleep(0.05)
        cluster.remove_node(victim, allow_graceful=False)

    killing = threading.Thread(target=kill)
    killing.start()
    found = search(6, 0, 100.0, tmp_path / "trials.db", trials)
    killing.join()
    assert len(found.trials) == 6
    assert all(each.outcome == outcome_of(each.point) for each in found.trials)
    begun = [name.partition("-") for name in os.listdir(notes)]
    lost = {point for point, _, node in begun if node == victim.node_id}
    assert lost
    assert lost <= {point for point, _, node in begun if node == head}


def test_points_that_cannot_be_reached_and_nodes_that_do_not_fit_are_told_apart(
    address: str, tmp_path: Path
) -> None:
    def trial(kit: Any, point: Point) -> Outcome | str:
        if point.latency < 0.4:
            return "too far"
        return outcome_of(point)

    runs = ClusterTrials(address, None, 4, run=trial)  # type: ignore[arg-type]
    found = search(4, 0, 100.0, tmp_path / "trials.db", runs)
    problems = {trial.point.latency: trial.problem for trial in found.trials}
    assert {latency < 0.4: problem for latency, problem in problems.items()} == {
        True: "too far",
        False: "",
    }
    far = ClusterTrials(address, None, 4, run=lambda kit, point: "too far")  # type: ignore[arg-type]
    with pytest.raises(PruneFailed, match="too far"):
        search(2, 0, 100.0, tmp_path / "far.db", far)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measures_as": ("Another", ("avx2",), "1.0")}, "the search was begun on Another"),
        ({"software": "0.0.1"}, "the search was begun with 0.0.1"),
    ],
)
def test_a_node_that_would_measure_something_else_is_refused(
    address: str, digits_parent: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    kit = replace(kit_of(digits_parent), **change)
    with pytest.raises(CompressionError, match=words):
        search(2, 0, 1.0, tmp_path / "trials.db", ClusterTrials(address, kit, 2))


def kit_of(weights: Path) -> Kit:
    recipe = Recipe("zoo:small-cnn-28", "digits", str(weights), "cpu-fp32", search=2)
    pixels = {"train": (np.zeros((1, 28, 28, 1), np.uint8), np.zeros(1, np.int64))}
    setting = Setting(recipe, ["0"], "digest", "classification", {"train": []})
    return pack(setting, pixels, [])


def test_a_cluster_that_is_not_there_is_said(digits_parent: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    trials = ClusterTrials("127.0.0.1:1", kit_of(digits_parent), 2)
    with pytest.raises(CompressionError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        search(2, 0, 1.0, tmp_path / "trials.db", trials)


def test_kits_of_different_searches_are_known_apart(digits_parent: Path, tmp_path: Path) -> None:
    weights, table = tmp_path / "parent.safetensors", tmp_path / "table.json"
    weights.write_bytes(digits_parent.read_bytes())
    table.write_text("{}")
    kit = kit_of(weights)
    assert kit.key == kit_of(weights).key
    assert pack(kit.setting, kit.pixels, [table]).key != kit.key
    # The same file, trained anew.
    weights.write_bytes(digits_parent.read_bytes() + b" ")
    assert kit_of(weights).key != kit.key
    assert cluster_trials.software() == kit.software


def test_ray_is_for_a_search(digits_parent: Path, tmp_path: Path) -> None:
    recipe = Recipe("zoo:small-cnn-28", "digits", str(digits_parent))
    with pytest.raises(UsageInvalid, match="give --search N, too"):
        compress(recipe, tmp_path / "out", ray="local")
    assert not (tmp_path / "out").exists()


def test_without_ray_it_is_said_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["ray"] = None
from pollard.client.cli import _main
sys.exit(_main.run(sys.argv[1:]))
"""
    command = ["compress", "zoo:small-cnn-28", "--data", "digits", "--search", "2"]
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--ray", "auto", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2
    assert "pip install 'pollard-compression[ray]'" in done.stderr


QUICK = ["zoo:small-cnn-28", "--data", "digits", "--epochs", "2", "--train-images", "400"]


def train(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = "import sys; from pollard.client.cli import _main; sys.exit(_main.run(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, "train", *QUICK, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_process_of_a_cluster_has_one_core(tmp_path: Path) -> None:
    done = train("--out", tmp_path / "out.safetensors", "--threads", 2, "--ray", "auto")
    assert done.returncode == 2
    assert "--threads and --ray exclude each other" in " ".join(done.stderr.split())


def test_a_cluster_learns_what_one_process_learns(address: str, tmp_path: Path) -> None:
    history = []
    for name, more in (("one", ["--threads", 1]), ("cluster", ["--ray", address])):
        told = tmp_path / f"{name}.json"
        out = tmp_path / f"{name}.safetensors"
        done = train("--out", out, "--json", told, *more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Accuracy") == 1
        assert out.exists()
        history.append(json.loads(told.read_text())["history"])
    assert history[1]["loss"] == pytest.approx(history[0]["loss"], rel=1e-3)


def test_a_training_that_lost_a_node_goes_on_from_its_checkpoint(
    make_cluster: Callable[[], Any], tmp_path: Path
) -> None:
    cluster = make_cluster()
    [victim] = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    out = tmp_path / "out.safetensors"
    how = ("--epochs", 30, "--out", out, "--checkpoint-seconds", 0, "--ray", cluster.address)

    def kill() -> None:
        while not any(path.name.endswith(".checkpoint.pt") for path in tmp_path.iterdir()):
            time.sleep(0.02)
        cluster.remove_node(victim, allow_graceful=False)

    killing = threading.Thread(target=kill)
    killing.start()
    done = train(*how)
    killing.join()
    assert done.returncode == 1
    assert "the training lost a process" in done.stderr
    assert "the same command with --resume goes on" in done.stderr
    assert not out.exists()
    # With what is left of the cluster: one core, which is this process's.
    done = train(*how, "--resume")
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_a_node_without_the_data_is_named_before_anything_is_trained(
    address: str, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 28, 28), np.uint8)
    for name, some in zip("ab", images, strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, image in enumerate(some):
            Image.fromarray(image).save(tmp_path / "images" / name / f"{number}.png")
    # A node's working directory is another one.
    where = ("--data", "images", "--out", "out.safetensors", "--ray", address)
    done = train(*where, folder=tmp_path)
    assert done.returncode == 1
    assert f"node {os.uname().nodename}: there is no data at images" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
