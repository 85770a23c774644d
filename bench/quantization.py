"""8-bit files of Pollard against a good engineer's, made and measured in the same run.

    python -m bench.quantization [NET …] [--data digits] [--epochs 12] [--out DIR]

A good engineer's file: onnxruntime's quant_pre_process, then quantize_static with uint8
activations, int8 weights per channel, min-max ranges, reduce_range where the processor has
no VNNI, on the same exported graph and the same calibration images. It takes normalised
floats; ours takes pixels.

Nets: `depthwise`, a MobileNetV2 of a few channels, and `small-cnn-28`, both trained here;
`resnet20-cifar` and `resnet56-cifar` with --weights and CIFAR-10 as --data. The gate is
`--max-drop` points on the choosing part; the figures are of the held-out part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.environment import environment, heading
from pollard.compress import export
from pollard.compress.candidates import Tuning, build
from pollard.compress.data import Dataset, Part, load_data
from pollard.compress.evaluate import (
    paired_drop,
    predict_part,
    right_answers,
    torch_predictor,
    wilson,
)
from pollard.compress.fake_quantize import trainer
from pollard.compress.macs import example_input
from pollard.compress.models import load_state, read_state
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import task_of
from pollard.compress.training import FitConfig, fit
from pollard.compress.zoo import find
from pollard.runtime.machine import Machine
from pollard.runtime.measure import interleaved
from pollard.runtime.sessions import Session, open_session


class Inverted(nn.Module):
    """Widen, filter each channel by itself, narrow (Sandler et al., 2018)."""

    def __init__(self, ins: int, outs: int, stride: int = 1, widen: int = 4) -> None:
        super().__init__()
        wide = ins * widen
        self.inner = nn.Sequential(
            _unit(ins, wide, 1),
            _unit(wide, wide, 3, stride, wide),
            nn.Conv2d(wide, outs, 1, bias=False),
            nn.BatchNorm2d(outs),
        )
        self.adds = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return x + made if self.adds else made


def _unit(ins: int, outs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU6(),
    )


def depthwise(spec: InputSpec, classes: int) -> nn.Module:
    """Return a MobileNetV2 of a few channels for small pictures."""
    last = spec.height // 4
    return nn.Sequential(
        _unit(spec.channels, 16, 3),
        Inverted(16, 16),
        Inverted(16, 24, 2),
        Inverted(24, 24),
        Inverted(24, 32, 2),
        Inverted(32, 32),
        _unit(32, 96, 1),
        nn.AvgPool2d(last),
        nn.Flatten(),
        nn.Linear(96, classes),
    )


def engineers(core: onnx.ModelProto, inputs: NDArray[np.float32], vnni: bool) -> bytes:
    """Return a good engineer's 8-bit file of a float graph."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        def __init__(self) -> None:
            self.left = [inputs[i : i + 32] for i in range(0, len(inputs), 32)]

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return {export.CORE_INPUT: self.left.pop(0)} if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, made = (str(Path(folder) / f"{name}.onnx") for name in "abc")
        onnx.save(core, plain)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            made,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not vnni,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return Path(made).read_bytes()


def _float_predictor(session: Session, spec: InputSpec) -> Callable[..., NDArray[np.float32]]:
    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        feeds = {export.CORE_INPUT: spec.normalize(images).numpy()}
        return np.asarray(session.run(feeds)[export.OUTPUT], np.float32)

    return predict


def compare(net: nn.Module, spec: InputSpec, data: Dataset, arguments: Any) -> dict[str, Any]:
    """Return accuracies, their differences and latencies of float, the engineer's, and ours."""
    net.eval()
    vnni = Machine.detect().has_vnni
    count = arguments.calibration_images
    config = QuantizeConfig(count, reduce_range=not vnni)
    classes = len(data.classes)
    answers = predict_part(torch_predictor(net, spec), data.choose)
    verdict = task_of(data.task).judge(answers, data.choose, classes)
    fit_config = FitConfig(
        arguments.qat_epochs, 64, arguments.qat_rate, seed=arguments.seed, distill_weight=0.7
    )
    train = trainer(net, data, spec, fit_config) if arguments.qat_epochs else None
    tuning = Tuning(data.choose, verdict, classes, arguments.max_drop, train)
    with tempfile.TemporaryDirectory() as folder:
        files = build("parent", net, spec, Path(folder), data.train, config, tuning)
        raw = {file.target: file.path.read_bytes() for file in files}
        told = files[1].quantization
    work = net
    if rewrite_shortcuts(work, example_input(spec)):
        work.eval()
    core = export.export_core(work, spec)
    theirs = engineers(core, spec.normalize(data.train.images[:count]).numpy(), vnni)
    sessions = {
        "float": open_session(raw["cpu-fp32"]),
        "engineer": open_session(theirs),
        "ours": open_session(raw["cpu-int8"], target="cpu-int8"),
    }
    rights = {name: _right(session, spec, data.held_out) for name, session in sessions.items()}
    pixels = data.held_out.images[:1]
    feeds = {
        name: {
            session.inputs[0].name: pixels if name != "engineer" else spec.normalize(pixels).numpy()
        }
        for name, session in sessions.items()
    }
    turns = interleaved(
        [lambda s=s, f=feeds[n]: s.raw.run(None, f) for n, s in sessions.items()],  # type: ignore[misc]
        rounds=60,
    )
    held_out = data.held_out
    sizes = {"float": raw["cpu-fp32"], "engineer": theirs, "ours": raw["cpu-int8"]}
    return {
        "held_out": len(held_out),
        "accuracy": {
            name: vars(wilson(int(each.sum()), len(each), held_out.name))
            for name, each in rights.items()
        },
        "lost_by_engineer": vars(paired_drop(rights["float"], rights["engineer"])),
        "lost_by_ours": vars(paired_drop(rights["float"], rights["ours"])),
        "ours_behind_engineer": vars(paired_drop(rights["engineer"], rights["ours"])),
        "latency_us": {
            name: round(float(np.median(times)), 1)
            for name, times in zip(sessions, turns, strict=True)
        },
        "bytes": {name: len(file) for name, file in sizes.items()},
        "how": told,
    }


def _right(session: Session, spec: InputSpec, part: Part) -> NDArray[np.bool_]:
    if session.inputs[0].name == export.CORE_INPUT:
        predict = _float_predictor(session, spec)
    else:
        name = session.inputs[0].name

        def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return np.asarray(session.run({name: images})[export.OUTPUT], np.float32)

    return right_answers(predict_part(predict, part), part)


def _net(name: str, arguments: Any) -> tuple[nn.Module, InputSpec, Dataset]:
    if name == "depthwise":
        spec = find("small-cnn-28").spec
        if arguments.data != "digits":
            spec = replace(find("resnet20-cifar").spec, augmentation="crop-flip")
    else:
        spec = find(name).spec
    data = load_data(arguments.data, spec, max_train_images=arguments.train_images)
    if arguments.images is not None:
        data = replace(data, choose=_first(data.choose, arguments.images),
                       held_out=_first(data.held_out, arguments.images))  # fmt: skip
    torch.manual_seed(arguments.seed)
    classes = len(data.classes)
    net = depthwise(spec, classes) if name == "depthwise" else find(name).build(classes)
    if arguments.weights:
        load_state(net, read_state(Path(arguments.weights)), arguments.weights)
    else:
        fit(net, data, spec, FitConfig(arguments.epochs, 64, 4e-3, seed=arguments.seed))
    return net, spec, data


def _first(part: Part, count: int) -> Part:
    return Part(part.name, part.images[:count], part.labels[:count])


def main() -> None:
    """Compare all nets, or those named; write DIR/quantization.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("nets", nargs="*", default=["depthwise"])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--weights", default="")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--qat-epochs", type=int, default=0)
    parser.add_argument("--qat-rate", type=float, default=3e-4)
    parser.add_argument("--calibration-images", type=int, default=512)
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--images", type=int, help="Only so many of choose and of held-out.")
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = environment()
    rows = {}
    for name in arguments.nets:
        rows[name] = compare(*_net(name, arguments), arguments)
        print(json.dumps({name: {k: v for k, v in rows[name].items() if k != "how"}}, indent=1))
    if arguments.out is not None:
        # Where the data lie here is nobody's business.
        told = {key: str(value) for key, value in vars(arguments).items()}
        told["data"] = Path(arguments.data).name
        content = {"environment": before, "arguments": told, "nets": rows}
        raw = json.dumps(content, indent=1) + "\n"
        (arguments.out / "quantization.json").write_text(raw, encoding="utf-8")
        text = _page(before, rows, arguments.data)
        (arguments.out / "quantization.md").write_text(text, encoding="utf-8")


def _page(before: dict[str, object], rows: dict[str, Any], data: str) -> str:
    lines = [
        "# 8 bits against a good engineer's",
        "",
        heading(before),
        f"Data: {Path(data).name}; `python -m bench.quantization`. Points are lost against float, "
        "with paired 95 % intervals, on images that nothing was chosen by. Latency: one image, one "
        "thread, interleaved medians; the engineer's file takes floats, which favours it.",
        "",
        "| net | n | float | engineer's lost | ours lost | divergence, best / min-max "
        "| latency float / engineer's / ours, µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        trials = {trial["name"]: trial["divergence"] for trial in row["how"]["trials"]}
        latency = row["latency_us"]
        lines.append(
            f"| {name} | {row['held_out']} | {row['accuracy']['float']['value']:.2%} "
            f"| {_interval(row['lost_by_engineer'])} | {_interval(row['lost_by_ours'])} "
            f"| {row['how']['divergence']:.2g} / {trials['min-max']:.2g} "
            f"| {latency['float']} / {latency['engineer']} / {latency['ours']} |"
        )
    return "\n".join(lines) + "\n"


def _interval(drop: dict[str, float]) -> str:
    return f"{drop['points']:+.2f} ({drop['lower']:+.2f} to {drop['upper']:+.2f})"


if __name__ == "__main__":
    main()
