from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from torch import nn

from pollard.compress import latency
from pollard.compress.kernels import KINDS, Kernel, kernel_of
from pollard.compress.latency import LatencyTable
from pollard.compress.operations import list_operations
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find
from pollard.runtime.machine import Machine

SMALL = Kernel("Conv", 8, 8, 8, 8, 8, 8, (3, 3), padding=(1, 1), activation="Relu")
# Two hundred times the work: no noise turns that around.
LARGE = Kernel("Conv", 64, 64, 16, 16, 16, 16, (3, 3), padding=(1, 1), activation="Relu")


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_more_work_takes_longer_and_is_kept_for_the_next(target: str, tmp_path: Path) -> None:
    table = LatencyTable(target, folder=tmp_path)
    assert table.measure([SMALL, LARGE]) == 2
    assert table[LARGE] > table[SMALL] > 0
    assert table.overheads.per_node > 0
    again = LatencyTable(target, folder=tmp_path)
    assert again.measure([SMALL, LARGE]) == 0
    assert again.rows == table.rows
    assert again.digest([LARGE, SMALL]) == table.digest([SMALL, LARGE])
    assert again.digest([SMALL]) != table.digest([SMALL, LARGE])


def test_a_dense_layer_costs_what_it_takes_with_its_activation_too(tmp_path: Path) -> None:
    # ONNX Runtime gives the two a name of its own when it makes one operator of them.
    small = Kernel("Gemm", 8, 8, 1, 1, 1, 1)
    large = dataclasses.replace(small, in_channels=4096, out_channels=256, activation="Relu")
    table = LatencyTable("cpu-fp32", folder=tmp_path)
    table.measure([small, large])
    assert table[large] > table[small]


def test_every_kind_runs_in_both_targets(tmp_path: Path) -> None:
    kernels = []
    for kind in sorted(KINDS):
        plain = Kernel(kind, 8, 8, 8, 8, 8, 8)
        changes: dict[str, object] = {}
        if kind == "Gemm":
            changes = {"height": 1, "width": 1, "out_height": 1, "out_width": 1}
        elif kind in ("MaxPool", "AveragePool"):
            changes = {"out_height": 4, "out_width": 4, "kernel": (2, 2), "stride": (2, 2)}
        elif kind in ("Resize", "ConvTranspose"):
            changes = {"out_height": 16, "out_width": 16}
            if kind == "ConvTranspose":
                changes |= {"kernel": (2, 2), "stride": (2, 2)}
        elif kind.endswith("Pixels"):
            changes = {"in_channels": 3, "out_channels": 3}
        kernels.append(dataclasses.replace(plain, **changes))  # type: ignore[arg-type]
    depthwise = dataclasses.replace(SMALL, groups=8, adds=True, activation="Clip")
    kernels.append(depthwise)
    for target in ("cpu-fp32", "cpu-int8"):
        table = LatencyTable(target, folder=tmp_path)
        assert table.measure(kernels) == len(kernels)
        assert all(table[kernel] > 0 for kernel in kernels)


def test_of_the_rounds_the_fastest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(LatencyTable, "_time", lambda self, kernels: {SMALL.key: next(slow)})
    seen = []
    table = LatencyTable("cpu-fp32", folder=tmp_path)
    table.measure([SMALL], between=lambda: seen.append(SMALL.key in table.rows))
    assert table[SMALL] == 3.0
    assert seen == [False] * 3


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_SIDE_BY_SIDE", 1)
    monkeypatch.setattr(latency, "_KEPT_TOGETHER", 1)
    table = LatencyTable("cpu-fp32", folder=tmp_path)

    def interrupt_the_second() -> None:
        if SMALL.key in table.rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.measure([SMALL, LARGE], between=interrupt_the_second)
    again = LatencyTable("cpu-fp32", folder=tmp_path)
    assert again[SMALL] == table[SMALL]
    assert again.measure([SMALL, LARGE]) == 1


def test_a_table_of_another_machine_or_runtime_is_not_read(tmp_path: Path) -> None:
    here = Machine.detect()
    table = LatencyTable("cpu-fp32", machine=here, folder=tmp_path)
    table.measure([SMALL])
    for changed in (
        {"onnxruntime": "0.0.1"}, {"processor": "abacus"}, {"cpu_features": frozenset({"avx9"})},
    ):  # fmt: skip
        other = dataclasses.replace(here, **changed)  # type: ignore[arg-type]
        assert LatencyTable("cpu-fp32", machine=other, folder=tmp_path).rows == {}
    for fields in ({"batch": 8}, {"threads": 2}):
        assert LatencyTable("cpu-fp32", folder=tmp_path, **fields).rows == {}  # type: ignore[arg-type]
    # Renamed by hand, it is still not taken for what it is not.
    stranger = LatencyTable("cpu-int8", folder=tmp_path)
    table.path.rename(stranger.path)
    assert LatencyTable("cpu-int8", folder=tmp_path).rows == {}


def test_a_damaged_table_is_measured_anew(tmp_path: Path) -> None:
    table = LatencyTable("cpu-fp32", folder=tmp_path)
    table.measure([SMALL])
    for content in ("{", "[]", json.dumps({"rows": {"a": "b"}})):
        table.path.write_text(content)
        again = LatencyTable("cpu-fp32", folder=tmp_path)
        assert again.rows == {}
    assert again.measure([SMALL]) == 1
    assert json.loads(again.path.read_text())["rows"][SMALL.key] > 0


def test_two_that_measure_at_once_keep_each_others_rows(tmp_path: Path) -> None:
    one, other = (LatencyTable("cpu-fp32", folder=tmp_path) for _ in range(2))
    one.measure([SMALL])
    other.measure([LARGE])
    assert {SMALL.key, LARGE.key} <= LatencyTable("cpu-fp32", folder=tmp_path).rows.keys()


def test_rows_follow_the_widths(tmp_path: Path) -> None:
    entry = find("resnet20-cifar")
    operations = {op.name: op for op in list_operations(entry.build(10), entry.spec)}
    middle = operations["layer2.1.conv1"]
    half = kernel_of(middle, middle.channels({"layer2.1.conv1": 0.5}))
    assert half is not None
    assert half.key == "Conv 32-16 16x16-16x16 k3x3 p1x1 +Relu"
    spec = InputSpec(8, 8, 3, (0.5,) * 3, (0.5,) * 3)
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8))
    second = list_operations(depthwise, spec)[1]
    narrow = kernel_of(second, second.channels({"0": 0.5, "1": 0.5}))
    assert narrow is not None
    assert (narrow.in_channels, narrow.groups) == (4, 4)
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4))
    third = list_operations(grouped, spec)[1]
    assert kernel_of(third, third.channels({"0": 0.25})) is None
