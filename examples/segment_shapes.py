"""A U-Net from drawn scenes to masks over the network: python segment_shapes.py DIRECTORY

Needs running services (`pollard up`). Trains a small U-Net, packs it, pushes it, judges what is
served by the same measure as before, and paints the classes of a new scene's pixels.
DATA and EPOCHS make it quicker: `segment_shapes.py DIRECTORY shapes:200 2`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pollard.client import VisionClient
from pollard.compress.shapes import draw_scene


def pollard(*arguments: object) -> None:
    """Run a command as you would type it."""
    words = [str(argument) for argument in arguments]
    print("$ pollard", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pollard.client.cli", *words], check=True)


def main(directory: str, data: str = "shapes", epochs: str = "6") -> int:
    folder = Path(directory)
    weights, bundle = folder / "unet.safetensors", folder / "unet"
    vision = os.environ.get("POLLARD_VISION_ADDRESS", "127.0.0.1:8011")

    pollard("train", "small-unet", "--data", data, "--epochs", epochs, "--out", weights)
    pollard("bundle", "small-unet", "--weights", weights, "--data", data, "--out", bundle)
    pollard("models", "push", bundle, "--model", "pixels", "--alias", "production")

    found = {}
    for name, model, where in (("here", bundle, ()), ("served", "pixels", ("--server", vision))):
        pollard("eval", model, "--data", data, *where, "--json", folder / f"{name}.json")
        found[name] = json.loads((folder / f"{name}.json").read_text())["accuracy"]["value"]
    print(f"mIoU here {found['here']:.4f}, served {found['served']:.4f}")

    # A scene that no one has trained on, and what is true of it.
    drawn = draw_scene(seed=31_415_926)
    scene = folder / "scene.png"
    Image.fromarray(drawn.pixels).save(scene)
    pollard("predict", scene, "--model", "pixels", "--draw", folder / "mask.png")
    with VisionClient(vision) as client:
        answer = client.predict(scene, "pixels")
    for area in answer.areas:
        print(f"{area.label} {area.score:.1%}")
    right = 0 if answer.mask is None else np.mean(answer.mask == drawn.mask)
    print(f"{right:.1%} of the pixels are right")
    return 0 if abs(found["here"] - found["served"]) < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
