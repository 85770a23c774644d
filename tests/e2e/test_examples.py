"""Every program in `examples/` runs as its docstring says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pollard.client import ModelsClient
from pollard.compress.zoo import find

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def picture(path: Path, color: tuple[int, int, int], seed: int) -> None:
    noise = np.random.default_rng(seed).integers(-40, 40, (32, 32, 3))
    pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def served(up, make_bundle):
    bundle = make_bundle(size=8, channels=3, classes=3)
    with ModelsClient(up.address("models")) as models:
        pushed = models.push(bundle.path, "example")
        models.set_alias("example", "production", pushed.revision.revision)
    return up


def test_classify_images(served, tmp_path: Path):
    picture(tmp_path / "a.png", (200, 30, 30), 0)
    out = run(
        str(EXAMPLES / "classify_images.py"),
        "example",
        str(tmp_path / "a.png"),
        POLLARD_VISION_ADDRESS=served.address("preprocess"),
    )
    assert "class" in out
    assert "revision 1" in out


@pytest.mark.parametrize("example", ["infer_many.py", "triton_client.py"])
def test_tensors(served, example):
    out = run(
        str(EXAMPLES / example),
        "example",
        POLLARD_INFERENCE_ADDRESS=served.address("inference"),
    )
    assert "revision: {1: 100}" in out or "version 1: " in out


@pytest.mark.long
def test_a_model_of_your_own_is_trained_compressed_and_bundled(tmp_path: Path):
    colors = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
    images = tmp_path / "images"
    for name, color in colors.items():
        for index in range(60):
            picture(images / name / f"{index}.png", color, index)
    # The factory makes ten classes; the data decide what the head must be.
    factory = (
        EXAMPLES.joinpath("own_model.py")
        .read_text()
        .replace("classes: int = 10", "classes: int = 3")
    )
    (tmp_path / "own_model.py").write_text(factory)
    pollard = ["-m", "pollard.client.cli"]
    model = ["own_model:make", "--input-size", "32x32x3", "--mean", "0.5", "--std", "0.25"]
    data = ["--data", str(images)]
    run(*pollard, "train", *model, *data, "--epochs", "2", "--out", "own.safetensors", cwd=tmp_path)
    run(
        *pollard, "compress", *model, *data,
        "--weights", "own.safetensors", "--epochs", "1", "--out", "bundle",
        "--json", "figures.json", cwd=tmp_path,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["inputs"][0]["shape"] == ["-1", "32", "32", "3"]
    assert (tmp_path / "figures.json").exists()


@pytest.mark.long
def test_a_published_state_dict_is_loaded_packed_and_asked_about_a_photograph(up, tmp_path: Path):
    # Weights in torchvision's format: what is shown here does not depend on what they know.
    torch.manual_seed(0)
    network = find("resnet18").build(5)
    with torch.no_grad():
        # Statistics of what flows through it, and answers that are far from each other.
        network(torch.randn(8, 3, 64, 64))
        network.fc.weight *= 20
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    noise = np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((400, 300)).save(tmp_path / "photo.jpg")
    words = ["resnet18", *(str(tmp_path / n) for n in ("weights.pth", "labels.txt"))]
    words.append(str(tmp_path / "photo.jpg"))

    here = run(str(EXAMPLES / "load_preprocess_predict.py"), *words)
    assert "(1, 3, 224, 224)" in here
    served = run(
        str(EXAMPLES / "photo_to_predict.py"),
        *words,
        POLLARD_VISION_ADDRESS=up.address("preprocess"),
        POLLARD_MODELS_ADDRESS=up.address("models"),
    )
    assert "without data no accuracy was measured" in served
    assert served.splitlines()[-3:] == here.splitlines()[-3:]


@pytest.mark.long
def test_new_classes_are_learnt_on_an_old_backbone(tmp_path: Path):
    torch.manual_seed(0)
    torch.save(find("resnet20-cifar").build(10).state_dict(), tmp_path / "w.pth")
    for name, color in {"red": (200, 40, 40), "green": (40, 200, 40)}.items():
        for index in range(24):
            picture(tmp_path / "images" / name / f"{index}.png", color, index)
    out = run(
        str(EXAMPLES / "transfer_learning.py"),
        *(str(tmp_path / name) for name in ("images", "w.pth", "out.safetensors")),
        "resnet20-cifar",
        "3",
    )
    assert "the head is new, for other classes" in out
    assert "macro mean" in out
    assert (tmp_path / "out.safetensors").exists()


@pytest.mark.long
def test_digits_go_from_training_to_traffic_again_and_again(up, tmp_path: Path):
    for revision, epochs in ((1, "2"), (2, "1")):
        folder = tmp_path / epochs
        folder.mkdir()
        out = run(
            str(EXAMPLES / "digits_to_traffic.py"),
            str(folder),
            epochs,
            POLLARD_VISION_ADDRESS=up.address("preprocess"),
            POLLARD_MODELS_ADDRESS=up.address("models"),
        )
        assert "The served model answers as it was measured" in out
        here, served = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("here", "served")
        )
        assert served["model"].startswith(f"digits revision {revision} at ")
        # Scores travel as float32.
        for key in ("accuracy", "top5", "classes", "macro", "weighted", "confusion"):
            assert served[key] == here[key]
        assert abs(served["log_loss"] - here["log_loss"]) < 1e-5


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_checkpoint_is_compressed_and_rolled_out_by_canary(up, tmp_path: Path):
    torch.manual_seed(0)
    # The smallest network: what is shown is the way, which is the same for all.
    torch.save(find("small-cnn-28").build(2).state_dict(), tmp_path / "w.pth")
    for name, color in {"red": (200, 40, 40), "green": (40, 200, 40)}.items():
        for index in range(24):
            picture(tmp_path / "images" / name / f"{index}.png", color, index)
    out = run(
        str(EXAMPLES / "cifar_canary.py"),
        *(str(tmp_path), str(tmp_path / "images"), str(tmp_path / "w.pth"), "small-cnn-28"),
        # On a busy machine a few requests tell nothing of latency, and a network that knows
        # nothing of agreement.
        *("--hold", "1s", "--min-requests", "20", "--max-p99-ratio", "100"),
        *("--", "--prune", "0.7", "--max-drop", "100", "--epochs", "1", "--target", "cpu-fp32"),
        POLLARD_VISION_ADDRESS=up.address("preprocess"),
        POLLARD_MODELS_ADDRESS=up.address("models"),
    )
    assert "failed: 0" in out
    told = out.splitlines()[-1]
    assert "revision 1: " in told
    assert "revision 2: " in told
    with ModelsClient(up.address("models")) as models:
        assert models.alias("cifar").revision == 2


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


@pytest.mark.long
def test_a_detector_goes_from_scenes_to_boxes_over_the_network(up, tmp_path: Path):
    out = run(
        str(EXAMPLES / "detect_shapes.py"), str(tmp_path), "shapes:80", "1",
        # A network of a few steps has nothing to lose; 8 bits are compared elsewhere. Most of it
        # is cut, so that what is left is faster on a busy machine too.
        "--prune", "0.7", "--max-drop", "100", "--epochs", "1", "--target", "cpu-fp32",
        POLLARD_VISION_ADDRESS=up.address("preprocess"),
        POLLARD_MODELS_ADDRESS=up.address("models"),
    )  # fmt: skip
    assert "mAP here" in out
    manifest = json.loads((tmp_path / "detector" / "manifest.json").read_text())
    assert manifest["task"] == "TASK_DETECTION"
    assert manifest["postprocess"]["detection"]["boxes_output"] == "boxes"
    assert manifest["variants"][0]["measurement"]["accuracy"]["name"] == "mAP50-95"
    here, served = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("here", "served")
    )
    assert served["confusion"] == here["confusion"]
    assert size_of(tmp_path / "boxes.png") == size_of(tmp_path / "scene.png")


@pytest.mark.long
def test_a_u_net_goes_from_scenes_to_masks_over_the_network(up, tmp_path: Path):
    out = run(
        str(EXAMPLES / "segment_shapes.py"), str(tmp_path), "shapes:80", "1",
        POLLARD_VISION_ADDRESS=up.address("preprocess"),
        POLLARD_MODELS_ADDRESS=up.address("models"),
    )  # fmt: skip
    assert "of the pixels are right" in out
    here, served = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("here", "served")
    )
    # Every pixel of every scene, in the scene's own size, is what it was when it was measured here.
    assert served["confusion"] == here["confusion"]
    assert served["accuracy"]["value"] == here["accuracy"]["value"]
    assert size_of(tmp_path / "mask.png") == size_of(tmp_path / "scene.png")
