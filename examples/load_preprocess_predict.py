"""Load a network, preprocess a photograph, predict: python load_preprocess_predict.py

    python load_preprocess_predict.py vgg16 vgg16.pth labels.txt photo.jpg

The three steps that tutorials begin with. The weights are a state dict in torchvision's format
(`torch.save(model.state_dict(), "vgg16.pth")` there); labels.txt has one label a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pollard.compress import load_model


def main(name: str, weights: str, labels: str, photo: str) -> int:
    names = Path(labels).read_text(encoding="utf-8").splitlines()

    # Load: the network, and all of its weights or none.
    network = load_model(name, weights, classes=len(names))

    # Preprocess: decode, scale, cut out the centre, as the network was trained; then normalise.
    pixels = network.spec.pipeline.apply(Path(photo).read_bytes()).batch
    batch = network.spec.normalize(pixels)
    print(f"{photo}: {tuple(batch.shape)}, from {batch.min():.2f} to {batch.max():.2f}")

    # Predict.
    with torch.inference_mode():
        probabilities = network.module(batch).softmax(1)[0]
    for score, index in zip(*probabilities.topk(3), strict=True):
        print(f"{names[int(index)]} {float(score):.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
