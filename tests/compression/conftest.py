"""Synthetic pictures and one small trained model that the tests share."""

from __future__ import annotations

import atexit
import copy
import fcntl
import importlib.util
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from pollard.compress.export import export_core
from pollard.compress.prune import Pruned
from pollard.compress.spec import InputSpec

# Latency tables of tests stay with the tests: timings of a busy machine are worth nothing.
os.environ["POLLARD_CACHE"] = tempfile.mkdtemp(prefix="pollard-tests-")
atexit.register(shutil.rmtree, os.environ["POLLARD_CACHE"], ignore_errors=True)

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}

Tree = Callable[..., Path]


def _picture(
    colour: tuple[int, int, int], generator: np.random.Generator, size: int
) -> NDArray[np.uint8]:
    noise = generator.integers(-25, 26, (size, size, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def _encode(pixels: NDArray[np.uint8], form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form)
    return buffer.getvalue()


@pytest.fixture
def write_images(tmp_path: Path) -> Tree:
    """Return a function that writes folders of one colour each, class by class."""

    def write(
        *parts: str,
        per_class: int = 12,
        classes: tuple[str, ...] = tuple(COLOURS),
        name: str = "pictures",
        size: int = 16,
    ) -> Path:
        root = tmp_path / name
        generator = np.random.default_rng(3)
        for part in parts or ("",):
            for label in classes:
                folder = root / part / label
                folder.mkdir(parents=True)
                for index in range(per_class):
                    pixels = _picture(COLOURS[label], generator, size)
                    (folder / f"{index:03d}.jpg").write_bytes(_encode(pixels))
        return root

    return write


@pytest.fixture
def zip_folder() -> Callable[[Path, Path, str], Path]:
    """Return a function that packs a folder, optionally wrapped in another one."""

    def pack(folder: Path, target: Path, wrapper: str = "") -> Path:
        with zipfile.ZipFile(target, "w") as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    archive.write(path, Path(wrapper) / path.relative_to(folder))
        return target

    return pack


@pytest.fixture(scope="session")
def digits_parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of small-cnn-28, trained on digits for a few epochs: once for all workers."""
    from pollard.compress.train import TrainOptions, train

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    out = root / "parent" / "parent.safetensors"
    with (root / "parent.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            out.parent.mkdir(exist_ok=True)
            options = TrainOptions(epochs=5, batch_size=64)
            train("small-cnn-28", "digits", out, options=options, threads=2)
    return out


@pytest.fixture(scope="session")
def silenced() -> Callable[[nn.Module, Pruned], nn.Module]:
    """Return a function that gives the parent with the channels that were pruned set to zero."""

    def silence(parent: nn.Module, pruned: Pruned) -> nn.Module:
        module = copy.deepcopy(parent)
        with torch.no_grad():
            for name, kept in pruned.channels.items():
                layer = module.get_submodule(name)
                transposed = isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1
                for parameter in layer.parameters(recurse=False):
                    rows = (
                        parameter.transpose(0, 1)
                        if transposed and parameter.ndim > 1
                        else parameter
                    )
                    rows[[i for i in range(len(rows)) if i not in kept]] = 0
        return module

    return silence


@pytest.fixture(scope="session")
def architectures() -> dict[str, Callable[[], nn.Module]]:
    """Return the small architectures by name, each a function that builds one."""
    path = Path(__file__).with_name("architectures.py")
    spec = importlib.util.spec_from_file_location("pollard_test_architectures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, Callable[[], nn.Module]] = module.ARCHITECTURES
    return made


@pytest.fixture(scope="session")
def depthwise_net() -> Callable[..., nn.Module]:
    """Return a function that builds an untrained MobileNetV2 of a few channels.

    Its batch norms have uneven factors, as trained ones do: that is what makes depthwise
    networks hard to quantize.
    """

    def make(activation: type[nn.Module] = nn.ReLU6, classes: int = 5) -> nn.Module:
        torch.manual_seed(0)

        def unit(ins: int, outs: int, size: int, groups: int, last: bool = False) -> nn.Module:
            layers = [nn.Conv2d(ins, outs, size, padding=size // 2, groups=groups, bias=False)]
            norm: list[nn.Module] = [nn.BatchNorm2d(outs)]
            return nn.Sequential(*layers, *norm, *([] if last else [activation()]))

        class Inverted(nn.Module):
            def __init__(self, ins: int, outs: int) -> None:
                super().__init__()
                wide = 3 * ins
                self.inner = nn.Sequential(
                    unit(ins, wide, 1, 1), unit(wide, wide, 3, wide), unit(wide, outs, 1, 1, True)
                )
                self.adds = ins == outs

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                made: torch.Tensor = self.inner(x)
                return x + made if self.adds else made

        net = nn.Sequential(
            unit(3, 16, 3, 1), Inverted(16, 16), Inverted(16, 24), nn.AvgPool2d(16), nn.Flatten(),
            nn.Linear(24, classes),
        )  # fmt: skip
        net.train()
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.copy_(torch.exp(1.2 * torch.randn_like(module.weight)))
                    module.bias.normal_(0, 0.3)
            for _ in range(20):
                net(torch.randn(16, 3, 16, 16))
        return net.eval()

    return make


@pytest.fixture(scope="session")
def depthwise_core(
    depthwise_net: Callable[..., nn.Module],
) -> Callable[..., tuple[nn.Module, onnx.ModelProto, InputSpec]]:
    """Return a function that gives the network of `depthwise_net` exported, and what it takes.

    Exporting takes seconds: it is done once for each activation.
    """
    spec = InputSpec(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    made: dict[type[nn.Module], tuple[nn.Module, onnx.ModelProto]] = {}

    def make(
        activation: type[nn.Module] = nn.ReLU6,
    ) -> tuple[nn.Module, onnx.ModelProto, InputSpec]:
        if activation not in made:
            net = depthwise_net(activation)
            made[activation] = (net, export_core(net, spec))
        net, core = made[activation]
        return copy.deepcopy(net), core, spec

    return make
