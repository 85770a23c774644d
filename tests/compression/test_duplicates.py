from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pollard.compress.class_folders import Item
from pollard.compress.data import load_data
from pollard.compress.duplicates import find
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec

SPEC = InputSpec(16, 16, 3, (0.0,) * 3, (1.0,) * 3)
Tree = Callable[..., Path]


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_nothing_is_said_of_images_that_are_all_different(write_images: Tree) -> None:
    listener = Listener()
    assert load_data(write_images("train", "test"), SPEC, reporter=listener).warnings == []
    assert listener.said == []


def test_an_image_that_is_trained_on_and_judges_is_told(write_images: Tree) -> None:
    root = write_images("train", "val", "test")
    learnt = (root / "train" / "red" / "003.jpg").read_bytes()
    (root / "test" / "red" / "copy.jpg").write_bytes(learnt)
    listener = Listener()
    data = load_data(root, SPEC, reporter=listener)
    (told,) = data.warnings
    assert told.startswith("1 of the 37 images that judge")
    assert "such as test/red/copy.jpg = train/red/003.jpg: figures say too much" in told
    assert listener.said == [f"Warning: {told}"]


def test_an_image_in_two_classes_is_told(write_images: Tree) -> None:
    root = write_images("train", "val", "test")
    (root / "train" / "red" / "x.jpg").write_bytes(
        (root / "train" / "blue" / "004.jpg").read_bytes()
    )
    (told,) = load_data(root, SPEC).warnings
    assert told.startswith("1 image(s) lie in two classes")
    assert "train/red/x.jpg" in told
    assert "train/blue/004.jpg" in told


def test_three_examples_are_enough() -> None:
    seen = [(Item(f"{i}.jpg", "a", ""), bytes([i])) for i in range(5)]
    (told,) = find({"train": seen, "choose": [], "held-out": seen})
    assert told.startswith("5 of the 5")
    assert told.count(" = ") == 3
