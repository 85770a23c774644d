"""New classes on what another network has learnt: python transfer_learning.py IMAGES WEIGHTS OUT

    python transfer_learning.py flowers/ resnet50.pth flowers.safetensors resnet50

First the head alone learns, then block after block from the last to the first, at a tenth of the
learning rate. IMAGES is a directory or zip with CLASS/*.jpg.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def pollard(*arguments: object) -> None:
    """Run a command as you would type it."""
    words = [str(argument) for argument in arguments]
    print("$ pollard", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pollard.client.cli", *words], check=True)


def main(images: str, weights: str, out: str, model: str = "resnet50", epochs: str = "5") -> int:
    head = Path(out).with_name("head.safetensors")
    common = (model, "--data", images, "--epochs", epochs, "--optimizer", "adamw")
    pollard(
        "train", *common, "--from", weights, "--freeze", "backbone", "--learning-rate", "1e-3",
        "--out", head,
    )  # fmt: skip
    pollard(
        "train", *common, "--from", head, "--freeze", "backbone", "--unfreeze-every", "1",
        "--learning-rate", "1e-4", "--out", out,
    )  # fmt: skip
    pollard("eval", model, "--weights", out, "--data", images)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
