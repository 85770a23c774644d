"""Models of others that do not run on a device, and files that need none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pollard.compress import accelerator, export
from pollard.compress.errors import DeviceUnusable
from pollard.compress.evaluate import torch_predictor
from pollard.compress.models import device_for, resolve
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find

SPEC = InputSpec(12, 12, 3, (0.5,) * 3, (0.25,) * 3)

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.layer, self.device = nn.Conv2d(3, 4, 3), device

    def forward(self, x):
        device = x.device if self.device is None else self.device
        return self.layer(x).mean((2, 3)) + torch.arange(4.0).to(device)

def stays():
    return Net("cpu")

def goes():
    return Net(None)
"""


class Told(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("code")
def test_code_that_makes_tensors_of_the_processor_is_told_or_stays_there(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, told = accelerator.find(device), Told()
    assert device_for(resolve("stranger:goes", SPEC), device, told) == place
    source = resolve("stranger:stays", SPEC)
    with pytest.raises(DeviceUnusable, match=r"does not run on .*give --device cpu"):
        device_for(source, device, told)
    assert told.lines == []
    # What "auto" finds, were the device a GPU.
    monkeypatch.setattr(accelerator, "find", lambda name: place)
    assert device_for(source, "auto", told) == accelerator.CPU
    assert len(told.lines) == 1
    assert told.lines[0].startswith("PyTorch computes on the processor: the model does not run on")


def test_networks_of_files_answer_from_the_processor(
    device: str, tolerance: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    spec = find("resnet20-cifar").spec
    net = find("resnet20-cifar").build(4).eval()
    path = tmp_path / "net.onnx"
    path.write_bytes(export.serialize(export.export_core(net, torch.zeros(1, 3, 32, 32))))
    module = resolve(str(path), spec).build(0)
    images = export.probe_images(spec, 4)
    wanted = torch_predictor(module, spec)(images)
    with accelerator.on(accelerator.find(device)):
        got = torch_predictor(module, spec)(images)
    # The pixels are scaled on the device, which need not round as the processor does.
    assert abs(wanted - got).max() <= 1e-3 * tolerance * abs(wanted).max()


def test_modules_come_back_whatever_happens(device: str) -> None:
    net, kept = nn.Linear(3, 2), nn.Linear(3, 2)
    net.register_buffer("seen", torch.ones(1))
    place = accelerator.find(device)
    inside: set[torch.device] = set()

    def tensors() -> list[Tensor]:
        return [*net.parameters(), *net.buffers(), *kept.parameters()]

    def fail() -> None:
        with accelerator.placed(net, kept) as told:
            inside.update(tensor.device for tensor in tensors())
            assert told == place
            raise KeyError

    with accelerator.on(place), pytest.raises(KeyError):
        fail()
    assert inside == {place}
    assert {tensor.device for tensor in tensors()} == {accelerator.CPU}
