"""A detector from drawn scenes to boxes over the network: python detect_shapes.py DIRECTORY

Needs running services (`pollard up`). Trains a small FCOS, compresses it, pushes it, judges what is
served by the same measure as before, and paints the boxes that it finds in a new scene.
DATA, EPOCHS and flags of `pollard compress` make it quicker:
`detect_shapes.py DIRECTORY shapes:200 2 --max-drop 100 --target cpu-fp32`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from pollard.client import VisionClient
from pollard.compress.shapes import draw_scene


def pollard(*arguments: object) -> None:
    """Run a command as you would type it."""
    words = [str(argument) for argument in arguments]
    print("$ pollard", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pollard.client.cli", *words], check=True)


def main(directory: str, data: str = "shapes", epochs: str = "12", *flags: str) -> int:
    folder = Path(directory)
    weights, bundle = folder / "detector.safetensors", folder / "detector"
    vision = os.environ.get("POLLARD_VISION_ADDRESS", "127.0.0.1:8011")

    pollard("train", "small-fcos", "--data", data, "--epochs", epochs, "--out", weights)
    pollard(
        "compress", "small-fcos", "--weights", weights, "--data", data, "--prune", "0.4",
        "--max-drop", "2", "--out", bundle, *flags,
    )  # fmt: skip
    pollard("models", "push", bundle, "--model", "shapes", "--alias", "production")

    found = {}
    for name, model, where in (("here", bundle, ()), ("served", "shapes", ("--server", vision))):
        pollard("eval", model, "--data", data, *where, "--json", folder / f"{name}.json")
        found[name] = json.loads((folder / f"{name}.json").read_text())["accuracy"]["value"]
    print(f"mAP here {found['here']:.4f}, served {found['served']:.4f}")

    # A scene that no one has trained on.
    scene = folder / "scene.png"
    Image.fromarray(draw_scene(seed=31_415_926).pixels).save(scene)
    pollard("predict", scene, "--model", "shapes", "--draw", folder / "boxes.png")
    with VisionClient(vision) as client:
        for box in client.predict(scene, "shapes", score_threshold=0.2).objects or ():
            corners = ", ".join(f"{edge:.1f}" for edge in (box.x1, box.y1, box.x2, box.y2))
            print(f"{box.label.label} {box.label.score:.2f} at {corners}")
    return 0 if abs(found["here"] - found["served"]) < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
