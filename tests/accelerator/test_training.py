"""Training on a device gives what training on the processor gives, and leaves nothing there."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pollard.compress import accelerator, augmentation
from pollard.compress.checkpoint import Checkpoint
from pollard.compress.data import Dataset, load_data
from pollard.compress.evaluate import predict_part, torch_predictor
from pollard.compress.recover import recover
from pollard.compress.spec import InputSpec
from pollard.compress.train import TrainOptions, train
from pollard.compress.training import FitConfig, History, fit
from pollard.compress.zoo import find

SPEC = InputSpec(28, 28, 3, (0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    """A convolution, a norm, and chance, which devices draw in ways of their own."""

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Dropout(dropout),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.body(x)
        return made


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("shapes:120", SPEC)


def _net(data: Dataset, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return Net(len(data.classes), dropout)


def _fit_on(
    name: str, data: Dataset, config: FitConfig, dropout: float = 0.0
) -> tuple[History, nn.Module]:
    net = _net(data, dropout)
    with accelerator.on(accelerator.find(name)):
        history = fit(net, data, SPEC, config)
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}
    return history, net


@pytest.mark.parametrize(
    ("augment", "options"),
    [
        ("none", {"optimizer": "sgd"}),
        ("flip,shift=0.2,rotation=15,crop=0.4,colour=0.3", {"ema": 0.9}),
        ("mixup=0.4", {"optimizer": "adam", "loss": "mse"}),
        ("cutmix=1", {"bf16": True, "label_smoothing": 0.1}),
    ],
)
def test_every_way_of_training_gives_what_the_processor_gives(
    augment: str, options: dict[str, object], data: Dataset, device: str, tolerance: float
) -> None:
    config = FitConfig(2, 16, augment=augmentation.parse(augment), **options)  # type: ignore[arg-type]
    here, net = _fit_on("cpu", data, config)
    there, same = _fit_on(device, data, config)
    if config.bf16:  # which the pretended device computes in float32
        tolerance = 0.1
    assert there.loss == pytest.approx(here.loss, rel=tolerance)
    for wanted, got in zip(net.parameters(), same.parameters(), strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


def test_a_run_that_was_broken_off_goes_on_to_the_same_weights(
    data: Dataset, device: str, tmp_path: Path
) -> None:
    config = FitConfig(3, 16, augment=augmentation.parse("flip"), ema=0.9)

    class Broken(Exception):
        pass

    class Breaks:
        def step(self, step: int, loss: float, learning_rate: float) -> None:
            if step == 8:
                raise Broken

        def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None: ...

    path = tmp_path / "c.pt"
    whole, net = _fit_on(device, data, config, 0.1)
    with accelerator.on(accelerator.find(device)):
        halved = _net(data, 0.1)
        with pytest.raises(Broken):
            fit(
                halved, data, SPEC, config, checkpoint=Checkpoint(path, every_seconds=0, share=1),
                observer=Breaks(),
            )  # fmt: skip
        assert {tensor.device.type for tensor in halved.state_dict().values()} == {"cpu"}
        again = _net(data, 0.1)
        history = fit(again, data, SPEC, config, checkpoint=Checkpoint(path))
    assert history.loss == pytest.approx(whole.loss, rel=1e-4)
    for wanted, got in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_recovery_with_a_teacher_gives_what_the_processor_gives(
    data: Dataset, device: str, tolerance: float
) -> None:
    # Adam would make much of the noise in the gradients of what is zero.
    config, found = FitConfig(1, 16, 0.01, optimizer="sgd", distill_weight=0.7), []
    for name in ("cpu", device):
        teacher, pupil = _net(data), _net(data)
        with torch.no_grad():
            pupil.body[0].weight[:4] = 0  # type: ignore[index, union-attr]
        with accelerator.on(accelerator.find(name)):
            history = recover(pupil, teacher, data, SPEC, config)
        assert {each.device.type for each in (*pupil.parameters(), *teacher.buffers())} == {"cpu"}
        found.append(history)
    assert found[1].loss == pytest.approx(found[0].loss, rel=tolerance)


@pytest.mark.parametrize("model", ["small-cnn-28", "small-fcos", "small-unet"])
def test_the_command_s_training_of_every_task_gives_the_processor_s_weights(
    model: str, device: str, tolerance: float, tmp_path: Path
) -> None:
    spec = InputSpec(28, 28, 1, (0.5,), (0.25,)) if model == "small-cnn-28" else None
    options = TrainOptions(epochs=1, batch_size=16)
    results = [
        train(
            model, "shapes:60", tmp_path / f"{name}.safetensors", options=options, device=name,
            spec=spec,
        )
        for name in ("cpu", device)
    ]  # fmt: skip
    loss = [result.history.loss[0] for result in results]
    assert loss[1] == pytest.approx(loss[0], rel=tolerance)


# One of each kind.
_NETWORKS = (
    "small-cnn-28", "resnet20-cifar", "vgg16-bn-cifar", "mobilenet-v2-cifar", "inception-v3",
    "small-fcos", "small-unet",
)  # fmt: skip


@pytest.mark.parametrize("name", _NETWORKS)
def test_every_kind_of_network_of_the_zoo_learns_and_answers_on_it(name: str, device: str) -> None:
    entry = find(name)
    torch.manual_seed(0)
    net, spec = entry.build(5), entry.spec
    images = np.random.default_rng(0).integers(0, 256, (2, *spec.shape), np.uint8)
    wanted = torch_predictor(copy.deepcopy(net), spec)(images)
    with accelerator.on(accelerator.find(device)):
        got = torch_predictor(net, spec)(images)
        with accelerator.placed(net) as place:
            outputs = net.train()(spec.normalize(images, place))
            parts = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(part.float().square().mean() for part in parts).backward()
    gradients = [each.grad for each in net.parameters() if each.grad is not None]
    assert gradients
    assert {each.device.type for each in gradients} == {"cpu"}
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3 * float(np.ptp(wanted)))


def test_answers_for_many_images_are_the_processor_s(data: Dataset, device: str) -> None:
    net = _net(data)
    wanted = predict_part(torch_predictor(net, SPEC), data.train)
    with accelerator.on(accelerator.find(device)):
        got = predict_part(torch_predictor(net, SPEC), data.train)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
