"""From handwritten digits to live traffic: python digits_to_traffic.py DIRECTORY

Needs running services (`pollard up`). Trains a small CNN, packs it, pushes it, asks it about
its own test images over the network, and compares with the same figures computed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def pollard(*arguments: object) -> None:
    """Run a command as you would type it."""
    words = [str(argument) for argument in arguments]
    print("$ pollard", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pollard.client.cli", *words], check=True)


def main(directory: str, epochs: str = "20") -> int:
    folder = Path(directory)
    weights, bundle = folder / "digits.safetensors", folder / "bundle"
    vision = os.environ.get("POLLARD_VISION_ADDRESS", "127.0.0.1:8011")

    pollard("train", "small-cnn-28", "--data", "digits", "--epochs", epochs, "--out", weights)
    pollard("bundle", "small-cnn-28", "--data", "digits", "--weights", weights, "--out", bundle)
    # Only a model's first revision becomes 'production' by itself.
    pollard("models", "push", bundle, "--model", "digits", "--alias", "production")

    figures = {}
    for name, model, where in (
        ("here", bundle, ()),
        ("served", "digits", ("--server", vision)),
    ):
        report = folder / f"{name}.json"
        pollard("eval", model, "--data", "digits", *where, "--json", report)
        figures[name] = json.loads(report.read_text())
    same = figures["here"]["confusion"] == figures["served"]["confusion"]
    print("The served model answers", "as it was measured" if same else "otherwise than measured")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
