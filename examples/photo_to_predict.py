"""From a published state dict to a service that knows photographs.

    python photo_to_predict.py vgg16 vgg16.pth labels.txt photo.jpg

Needs running services (`pollard up`). Packs the network with its labels, which no images are
needed for, pushes the bundle, and asks the service about the photograph as it lies on the disk:
decoding, scaling and cropping travel in the bundle.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pollard.client import VisionClient


def pollard(*arguments: object) -> None:
    """Run a command as you would type it."""
    words = [str(argument) for argument in arguments]
    print("$ pollard", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pollard.client.cli", *words], check=True)


def main(name: str, weights: str, labels: str, photo: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        pollard("bundle", name, "--weights", weights, "--labels", labels, "--out", bundle)
        pollard("models", "push", bundle, "--model", name, "--alias", "production")
    with VisionClient(os.environ.get("POLLARD_VISION_ADDRESS", "127.0.0.1:8011")) as vision:
        prediction = vision.predict(photo, name, top_k=3)
    for label in prediction.labels:
        print(f"{label.label} {label.score:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
