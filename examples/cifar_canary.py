"""A CIFAR ResNet from a checkpoint to a canary of its compressed self:

    python cifar_canary.py DIRECTORY cifar10.zip resnet20.pt
    python cifar_canary.py DIRECTORY DATA WEIGHTS NETWORK [ROLLOUT FLAGS] [-- COMPRESS FLAGS]

Needs running services (`pollard up`). Packs the checkpoint and pushes it, compresses it, pushes
that too, and moves the traffic over in steps while images are asked about. The services take the
traffic back by themselves if the smaller network is slower, fails, or answers otherwise. DATA is a
directory or zip with train/CLASS/* and test/CLASS/*, or CLASS/*.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from pollard.client import VisionClient
from pollard.compress.data import part_items

MODEL = "cifar"


def pollard(*arguments: object) -> None:
    """Run a command as you would type it."""
    words = [str(argument) for argument in arguments]
    print("$ pollard", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pollard.client.cli", *words], check=True)


class Traffic:
    """Asks about one image after the other, and counts which revision answered."""

    def __init__(self, data: str) -> None:
        source, _, items = part_items(data, "held-out")
        self.images = [bytes(source.read(item)) for item in items[:200]]
        self.answered: Counter[int] = Counter()
        self.failed = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _ask(self) -> None:
        address = os.environ.get("POLLARD_VISION_ADDRESS", "127.0.0.1:8011")
        with VisionClient(address) as vision:
            while not self._end.is_set():
                for found in vision.predict_batch(self.images[:4], MODEL):
                    if isinstance(found, Exception):
                        self.failed += 1
                    else:
                        self.answered[found.revision] += 1
                self.images = self.images[4:] + self.images[:4]


def main(
    directory: str, data: str, weights: str, network: str = "resnet20-cifar", *flags: str
) -> int:
    folder, cut = Path(directory), flags.index("--") if "--" in flags else len(flags)
    parent, small = folder / "parent", folder / "small"
    common = (network, "--data", data, "--weights", weights)

    pollard("bundle", *common, "--out", parent)
    pollard("models", "push", parent, "--model", MODEL)
    pollard("compress", *common, "--max-drop", "1", "--out", small, *flags[cut + 1 :])
    pollard("models", "push", small, "--model", MODEL)
    with Traffic(data) as traffic:
        pollard(
            "models", "rollout", MODEL, "2", "--steps", "25,100", "--hold", "10s",
            "--min-requests", "100", "--watch", *flags[:cut],
        )  # fmt: skip
    told = ", ".join(f"revision {key}: {traffic.answered[key]}" for key in sorted(traffic.answered))
    print(f"Answers by {told}; failed: {traffic.failed}")
    return 1 if traffic.failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
