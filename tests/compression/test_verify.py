from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pollard.compress.candidates import Candidate
from pollard.compress.errors import GateRefused
from pollard.compress.evaluate import Accuracy, Drop, wilson
from pollard.compress.verify import (
    Measured,
    Timing,
    confirm,
    explain_dropped,
    seen_before,
    select,
)
from pollard.compress.zoo import find
from pollard.runtime.measure import Ratio


def measured(
    folder: Path,
    name: str,
    us: float,
    drop: float = 0.0,
    size: int = 1000,
    lower: float | None = None,
) -> Measured:
    """Return a candidate with given figures; the parent takes 100 µs."""
    path = folder / f"{name}.onnx"
    path.write_bytes(bytes(size))
    entry = find("small-cnn-28")
    target = "cpu-int8" if name.endswith("int8") else "cpu-fp32"
    candidate = Candidate(name, target, path, entry.build(10), entry.spec, 10, 10)
    speed = 100.0 / us
    return Measured(
        candidate,
        wilson(99, 100, "d/choose"),
        Drop(drop, drop - 1, drop + 1),
        [Timing(1, us, us, 20)],
        Ratio(speed, lower or speed * 0.99, speed * 1.01),
        1.0,
        wilson(99, 100, "d/choose"),
        np.zeros((10, 10), np.int64),
    )


def test_the_fastest_that_holds_the_gate_is_taken(tmp_path: Path) -> None:
    field = [
        measured(tmp_path, "parent-fp32", 100),
        measured(tmp_path, "parent-int8", 60),
        measured(tmp_path, "pruned-fp32", 30, drop=0.9),
        measured(tmp_path, "pruned-int8", 20, drop=1.1),
    ]
    chosen = select(field, 1.0)
    assert chosen.candidate.name == "pruned-fp32"
    (dropped,) = explain_dropped(field, chosen, 1.0)
    assert dropped == {"stage": "quantize", "why": "pruned-int8 lost 1.10 points, 1 are allowed"}


def test_pruning_is_dropped_when_the_quantized_parent_is_faster(tmp_path: Path) -> None:
    field = [
        measured(tmp_path, "parent-fp32", 100),
        measured(tmp_path, "parent-int8", 30),
        measured(tmp_path, "pruned-fp32", 50),
        measured(tmp_path, "pruned-int8", 40),
    ]
    chosen = select(field, 1.0)
    assert chosen.candidate.name == "parent-int8"
    (dropped,) = explain_dropped(field, chosen, 1.0)
    assert dropped["stage"] == "prune"
    assert "40.0 µs" in dropped["why"]


def test_what_takes_more_than_a_budget_is_not_shipped_however_fast_it_is(tmp_path: Path) -> None:
    field = [
        measured(tmp_path, "parent-fp32", 100),
        measured(tmp_path, "parent-int8", 30),
        measured(tmp_path, "pruned-fp32", 20),
        measured(tmp_path, "pruned-int8", 50),
    ]
    overruns = {
        "parent-int8": "parent-int8 takes size 90 kB where size=60kB allows 60 kB",
        "pruned-fp32": "pruned-fp32 takes size 80 kB where size=60kB allows 60 kB",
    }
    assert select(field, 1.0, overruns).candidate.name == "pruned-int8"
    with pytest.raises(GateRefused, match=r"within the budget.*pruned-fp32 takes size 80 kB"):
        select(field[:3], 1.0, overruns)
    without = {"pruned-int8": "pruned-int8 takes latency 50 µs"}
    chosen = select(field, 1.0, without)
    assert explain_dropped(field, chosen, 1.0, without) == [
        {"stage": "quantize", "why": "pruned-int8 takes latency 50 µs"}
    ]


def test_of_two_equally_fast_the_smaller_file_is_taken(tmp_path: Path) -> None:
    field = [
        measured(tmp_path, "parent-fp32", 100),
        measured(tmp_path, "pruned-fp32", 30.0, size=4000),
        measured(tmp_path, "pruned-int8", 30.5, size=1000),
    ]
    assert select(field, 1.0).candidate.name == "pruned-int8"


def test_a_gate_that_nothing_holds_is_refused_with_all_numbers(tmp_path: Path) -> None:
    field = [
        measured(tmp_path, "parent-fp32", 100),
        measured(tmp_path, "parent-int8", 60, drop=0.4),
        measured(tmp_path, "pruned-int8", 20, drop=2.5),
    ]
    with pytest.raises(GateRefused) as caught:
        select(field, 0.2)
    assert "parent-int8 lost 0.40 points at 60.0 µs" in str(caught.value)
    assert "pruned-int8 lost 2.50 points at 20.0 µs" in str(caught.value)
    assert len(caught.value.figures["candidates"]) == 3
    assert caught.value.exit_code == 3


def test_what_is_not_surely_faster_is_refused(tmp_path: Path) -> None:
    field = [
        measured(tmp_path, "parent-fp32", 100),
        measured(tmp_path, "pruned-fp32", 96, lower=1.02),
    ]
    with pytest.raises(GateRefused, match=r"lower bound 1\.02"):
        select(field, 1.0)


def test_a_choice_that_does_not_hold_on_held_out_data_is_refused(tmp_path: Path) -> None:
    parent = measured(tmp_path, "parent-fp32", 100)
    confirm(parent, measured(tmp_path, "pruned-fp32", 50, drop=1.0), 1.0)
    with pytest.raises(GateRefused, match="not on the held-out data"):
        confirm(parent, measured(tmp_path, "pruned-fp32", 50, drop=1.2), 1.0)
    with pytest.raises(GateRefused, match="when timed again"):
        confirm(parent, measured(tmp_path, "pruned-fp32", 99, lower=1.0), 1.0)


def untimed(folder: Path, name: str, macs: int, drop: float = 0.0) -> Measured:
    """Return a candidate that was judged away from its device."""
    found = measured(folder, name, 100, drop)
    candidate = dataclasses.replace(found.candidate, macs=macs, target="cuda-fp16")
    return dataclasses.replace(found, candidate=candidate, timings=[], speedup=None)


def test_without_times_the_least_to_compute_is_taken(tmp_path: Path) -> None:
    field = [
        untimed(tmp_path, "parent-fp32", 10),
        untimed(tmp_path, "parent-fp16", 10),
        untimed(tmp_path, "pruned-fp16", 5),
    ]
    chosen = select(field, 1.0)
    assert chosen.candidate.name == "pruned-fp16"
    confirm(field[0], chosen, 1.0)
    assert explain_dropped(field, chosen, 1.0) == []


def test_without_times_the_gate_on_accuracy_holds_all_the_same(tmp_path: Path) -> None:
    field = [
        untimed(tmp_path, "parent-fp32", 10),
        untimed(tmp_path, "parent-fp16", 10, drop=0.5),
        untimed(tmp_path, "pruned-fp16", 5, drop=2.0),
    ]
    chosen = select(field, 1.0)
    assert chosen.candidate.name == "parent-fp16"
    (dropped,) = explain_dropped(field, chosen, 1.0)
    assert dropped == {"stage": "prune", "why": "pruned-fp16 lost 2.00 points, 1 are allowed"}
    with pytest.raises(GateRefused, match=r"pruned-fp16 lost 2\.00 points"):
        select(field, 0.1)


def test_a_gpu_is_judged_by_its_own_batch(tmp_path: Path) -> None:
    field = []
    for name, single, many in (
        ("parent-fp32", 100, 900),
        ("parent-fp16", 80, 600),
        ("pruned-fp16", 90, 300),
    ):
        found = measured(tmp_path, name, single)
        timings = [Timing(1, single, single, 20), Timing(32, many, many, 20)]
        speed = Ratio(900 / many, 880 / many, 920 / many)
        field.append(dataclasses.replace(found, timings=timings, speedup=speed, judged_batch=32))
    assert select(field, 1.0).candidate.name == "pruned-fp16"


@pytest.mark.parametrize(
    ("choosing", "held_out", "named"),
    [
        (wilson(975, 1000, "d/choose"), wilson(4495, 5000, "d/held-out"), "trained on d/choose"),
        (wilson(890, 1000, "d/choose"), wilson(4900, 5000, "d/held-out"), "trained on d/held-out"),
    ],
)
def test_a_parent_that_is_far_better_on_one_part_has_seen_it(
    choosing: Accuracy, held_out: Accuracy, named: str
) -> None:
    assert named in seen_before(choosing, held_out)


@pytest.mark.parametrize(
    ("choosing", "held_out"),
    [
        (wilson(902, 1000, "c"), wilson(4495, 5000, "h")),  # chance
        (wilson(30, 30, "c"), wilson(44, 50, "h")),  # far better, of too few to tell
        (wilson(9999, 10_000, "c"), wilson(99_700, 100_000, "h")),  # sure, and of no weight
        (wilson(50, 50, "c"), wilson(50, 50, "h")),
    ],
)
def test_chance_is_not_taken_for_knowledge(choosing: Accuracy, held_out: Accuracy) -> None:
    assert seen_before(choosing, held_out) == ""
