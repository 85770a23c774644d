from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from pollard.compress.errors import LabelsMismatch, ModelUnknown, UsageInvalid, WeightsInvalid
from pollard.compress.models import load_model, resolve, save_state
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find

SPEC = InputSpec(8, 8, 1, (0.5,), (0.5,))


def _state() -> dict[str, torch.Tensor]:
    return find("small-cnn-28").build(10).state_dict()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_both_formats_load(tmp_path: Path, suffix: str) -> None:
    state, path = _state(), tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    loaded = load_model("zoo:small-cnn-28", path)
    assert all(torch.equal(loaded.module.state_dict()[key], state[key]) for key in state)
    assert len(loaded.weights_digest) == 64
    assert not loaded.module.training


def test_checkpoints_of_data_parallel_training_are_unwrapped(tmp_path: Path) -> None:
    wrapped = {
        "state_dict": {f"module.{key}": value for key, value in _state().items()},
        "epoch": 3,
    }
    torch.save(wrapped, tmp_path / "w.pt")
    load_model("small-cnn-28", tmp_path / "w.pt")
    torch.save({"model": _state(), "epoch": 3}, tmp_path / "w.pth")
    load_model("small-cnn-28", tmp_path / "w.pth")


def test_every_key_that_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = _state()
    del state["fc1.bias"]
    state["head.weight"] = torch.zeros(3)
    state["conv2.weight"] = torch.zeros(64, 16, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsInvalid) as caught:
        load_model("small-cnn-28", tmp_path / "w.pt")
    message = str(caught.value)
    assert "missing: fc1.bias" in message
    assert "extra: head.weight" in message
    assert "conv2.weight ([64, 16, 3, 3] in the file, [64, 32, 3, 3] in the model)" in message


def test_a_pickled_model_is_refused_without_running_it(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    torch.save({"conv1.weight": Trap()}, tmp_path / "w.pt")
    with pytest.raises(WeightsInvalid, match="not a plain state dict"):
        load_model("small-cnn-28", tmp_path / "w.pt")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsInvalid):
        load_model("small-cnn-28", path)


def test_absent_and_not_finite_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsInvalid, match="there is no weights file"):
        load_model("small-cnn-28", tmp_path / "none.pt")
    state = _state()
    state["fc2.bias"][0] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsInvalid, match=r"not finite: fc2\.bias"):
        load_model("small-cnn-28", tmp_path / "w.pt")


def test_saved_weights_load_again(tmp_path: Path) -> None:
    model = find("resnet20-cifar").build(10)
    save_state(model, tmp_path / "w.safetensors")
    again = load_model("resnet20-cifar", tmp_path / "w.safetensors").module
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_factories.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5))\n"
        "def wrong():\n    return 3\n"
        "def lazy():\n"
        "    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(5))\n"
        "def rows():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2))\n"
        "def pixel():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1))\n"
        "def sized(classes):\n    return nn.Linear(3, classes)\n"
        "def broken():\n    return {}['weights']\n"
        "made = nn.Linear(2, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_factories"


def test_a_factory_is_found_by_import_path(factories: str) -> None:
    loaded = load_model(f"{factories}:net", spec=SPEC)
    assert loaded.classes == 5


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", "not a torch"),
        ("lazy", "lazy layers, .* run the model once"),
        ("rows", "must give logits"),
        ("pixel", r"it gives \[2, 4, 1, 1\], which \.flatten\(1\) makes of it"),
        ("nothing", "no callable"),
        ("sized", r"without arguments, but: .*'classes'.*def make\(\): return sized"),
        ("broken", r"failed with KeyError: 'weights' \(.*my_factories\.py, line 15\)"),
        ("made", "is a model already; name a function"),
    ],
)
def test_factories_that_give_no_model_or_one_of_no_task_are_refused(
    factories: str, name: str, why: str
) -> None:
    with pytest.raises(ModelUnknown, match=why):
        load_model(f"{factories}:{name}", spec=SPEC)


def test_the_head_must_have_the_classes_of_the_data(factories: str) -> None:
    with pytest.raises(LabelsMismatch, match="has 5 classes, the data 10"):
        load_model(f"{factories}:net", spec=SPEC, classes=10)


def test_a_factory_needs_its_input_stated() -> None:
    with pytest.raises(UsageInvalid, match="--input-size"):
        resolve("package.module:factory")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_package", r"'no_such_package'; it is looked for in .* and on PYTHONPATH"),
        ("./folder/own", "in the folder folder give own:net"),
        ("own.py", r"in the folder \. give own:net"),
        ("needs", r"cannot import 'needs': No module named 'no_such_library'$"),
        ("unfinished", r"SyntaxError: .*unfinished\.py, line 1"),
        ("divides", r"ZeroDivisionError: .*divides\.py, line 2"),
    ],
)
def test_what_cannot_be_imported_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own.py").touch()
    Path("needs.py").write_text("import no_such_library\n")
    Path("unfinished.py").write_text("def net(:\n")
    Path("divides.py").write_text("\n1 / 0\n")
    with pytest.raises(ModelUnknown, match=why):
        load_model(f"{name}:net", spec=SPEC)


def test_one_score_for_two_classes_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "single.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(1))\n".replace(
            "LazyLinear(1)", f"Linear({SPEC.height * SPEC.width * SPEC.channels}, 1)"
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LabelsMismatch, match="has 1 class, the data 2; it must give a score for"):
        load_model("single:net", spec=SPEC, classes=2)


@pytest.mark.long
def test_inception_keeps_its_second_classifier_for_training_only(tmp_path: Path) -> None:
    spec = InputSpec(75, 75, 3, (0.5,) * 3, (0.5,) * 3)
    trained = load_model("inception-v3", classes=3, spec=spec, auxiliary=True).module
    save_state(trained, tmp_path / "w.safetensors")
    served = load_model("inception-v3", tmp_path / "w.safetensors", classes=3, spec=spec).module
    keys = trained.state_dict().keys() - served.state_dict().keys()
    assert keys
    assert all(key.startswith("AuxLogits.") for key in keys)
    save_state(served, tmp_path / "w.safetensors")
    load_model("inception-v3", tmp_path / "w.safetensors", classes=3, spec=spec, auxiliary=True)
