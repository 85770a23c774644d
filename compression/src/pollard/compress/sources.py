"""Where images come from: directories, zip files, scikit-learn's digits, drawn shapes."""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.compress import shapes
from pollard.compress.errors import DataInvalid
from pollard.compress.truth import TaskName
from pollard.runtime.errors import ImageDamaged, ImageTooLarge
from pollard.runtime.images import ImageLimits

EXTENSIONS = (".jpg", ".jpeg", ".png")

# Images that may be drawn, and how far the seeds of two data sets lie apart.
_FEWEST, _SEEDS = 20, 1_000_000

# Folder names that say which part of the data they hold.
PARTS = {
    "train": "train",
    "training": "train",
    "val": "choose",
    "valid": "choose",
    "validation": "choose",
    "test": "held-out",
}


@dataclass(frozen=True)
class Item:
    """One image of a data set."""

    path: str
    """Path within the data set; for digits, its number."""
    label: str
    part: str
    """"train", "choose" or "held-out" when the data say so; else empty."""


class ImageSource(Protocol):
    """A data set before anything is decoded."""

    name: str
    items: list[Item]
    ignored: int
    """Files of other types beside the images."""

    def read(self, item: Item) -> bytes | NDArray[np.uint8]:
        """Return the bytes of an image file, or its pixels."""


@runtime_checkable
class LabelledSource(ImageSource, Protocol):
    """A data set whose images have boxes or masks."""

    classes: list[str]

    def truth(self, item: Item) -> NDArray[np.generic]:
        """Return what is true of an image, in pixels of the upright image.

        Boxes, float64 [objects, 5]: left, upper, right and lower edge, and the class; or the
        class of each pixel, uint8 [height, width].
        """


class DirectorySource:
    """A directory of `CLASS/*.jpg`, or of `train/CLASS/*.jpg` and `test/CLASS/*.jpg`."""

    def __init__(self, root: Path) -> None:
        self.name = root.name or str(root)
        self.root = root
        paths: list[str] = []
        empty: list[str] = []
        unreadable: list[str] = []

        def note(error: OSError) -> None:
            unreadable.append(f"{error.filename} ({error.strerror})")

        for directory, names, files in os.walk(root, onerror=note):
            names.sort()
            below = Path(directory).relative_to(root)
            paths.extend((below / file).as_posix() for file in sorted(files))
            if not names and not files and not _hidden(below.parts):
                empty.append(below.as_posix())
        if unreadable:
            raise DataInvalid(f"{root}: these folders cannot be read: {_some(unreadable)}")
        if empty and paths:
            raise DataInvalid(
                f"{root}: these folders are empty: {_some(empty)}. A class needs images; take the "
                "folders away, or fill them"
            )
        self._real, self.items, self.ignored = _classify(paths, str(root))

    def read(self, item: Item) -> bytes:
        """Return the bytes of the file."""
        try:
            return (self.root / self._real[item.path]).read_bytes()
        except OSError as error:
            raise ImageDamaged(f"it cannot be read: {error}") from error


class ZipSource:
    """A zip file of the same layout as a directory."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        try:
            self._zip = zipfile.ZipFile(path)
            paths = sorted(info.filename for info in self._zip.infolist() if not info.is_dir())
        except (zipfile.BadZipFile, OSError) as error:
            raise DataInvalid(f"{path} is not a readable zip file: {error}") from error
        self._real, self.items, self.ignored = _classify(paths, str(path))

    def read(self, item: Item) -> bytes:
        """Return the bytes of the file, never more than an image may have."""
        info = self._zip.getinfo(self._real[item.path])
        limit = ImageLimits().max_bytes
        if info.file_size > limit:
            raise ImageTooLarge(f"it has {info.file_size} bytes, at most {limit} are allowed")
        try:
            return self._zip.read(info)
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise ImageDamaged(f"it cannot be read: {error}") from error


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8×8 to 28×28 pixels."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        self.name = "digits"
        self.ignored = 0
        raw = load_digits()
        self._pixels = [_enlarge(image) for image in raw.images]
        self.items = [Item(f"{i:04d}", str(label), "") for i, label in enumerate(raw.target)]

    def read(self, item: Item) -> NDArray[np.uint8]:
        """Return uint8 pixels, 28 × 28."""
        return self._pixels[int(item.path)]


class ShapesSource:
    """Drawn shapes, one an image, 32 × 32 pixels: the same for the same count and seed."""

    COUNT = 1200

    def __init__(self, count: int = COUNT, seed: int = 0) -> None:
        self.name = "shapes"
        self.ignored = 0
        self._each, self._seed = count // len(shapes.NAMES), seed
        self.items = [
            Item(f"{label}/{number:03d}", label, "")
            for label in shapes.NAMES
            for number in range(self._each)
        ]

    def read(self, item: Item) -> NDArray[np.uint8]:
        """Return uint8 pixels, 32 × 32 × 3."""
        label, _, number = item.path.partition("/")
        place = int(number) + self._each * shapes.NAMES.index(label)
        return shapes.draw_single(label, place + self._seed * _SEEDS)


class ScenesSource:
    """Drawn scenes of several shapes, with a box for each or a class for each pixel.

    Colour images of 96 to 144 pixels in height and width, the same for the same count and seed.
    """

    COUNT = 2000

    def __init__(self, task: TaskName, count: int = COUNT, seed: int = 0) -> None:
        self.name = "shapes"
        self.ignored = 0
        self.classes = list(shapes.NAMES)
        self._task, self._seed = task, seed
        if task == "segmentation":
            self.classes.insert(0, "background")
        self.items = [Item(f"{number:05d}", "", "") for number in range(count)]

    def read(self, item: Item) -> NDArray[np.uint8]:
        """Return uint8 pixels, height × width × 3."""
        return self._draw(item).pixels

    def truth(self, item: Item) -> NDArray[np.generic]:
        """Return the boxes, float64 [objects, 5], or the class of each pixel, uint8."""
        scene = self._draw(item)
        return scene.mask if self._task == "segmentation" else scene.boxes

    def _draw(self, item: Item) -> shapes.Scene:
        return _scene(int(item.path) + self._seed * _SEEDS)


# Pixels and truth of a scene are asked for one after the other, by a few threads.
_scene = functools.lru_cache(maxsize=16)(shapes.draw_scene)


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    # 16 grey levels in the original; bicubic keeps the strokes crisp.
    levels = np.round(image * (255.0 / 16.0)).astype(np.uint8)
    return np.asarray(Image.fromarray(levels).resize((28, 28), Image.Resampling.BICUBIC))


def open_source(reference: str | Path) -> ImageSource:
    """Find a data set of classes.

    Args:
        reference: "digits", "shapes", "shapes:COUNT", "shapes:COUNT:SEED", a directory, or a zip
            file.

    Raises:
        DataInvalid: there is none, or it holds no images.
    """
    if str(reference) == "digits":
        return DigitsSource()
    if drawn := _drawn(reference, ShapesSource.COUNT):
        return ShapesSource(*drawn)
    path = Path(reference)
    if path.is_dir():
        return DirectorySource(path)
    if path.is_file():
        return ZipSource(path)
    raise DataInvalid(
        f'there is no data at {path}: give "digits", "shapes", a directory or a zip file with '
        "train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg"
    )


def open_labelled(reference: str | Path, task: TaskName) -> LabelledSource:
    """Find a data set of boxes or masks.

    Args:
        reference: "shapes", "shapes:COUNT" or "shapes:COUNT:SEED".
        task: "detection" or "segmentation".

    Raises:
        DataInvalid: there is none.
    """
    if drawn := _drawn(reference, ScenesSource.COUNT):
        return ScenesSource(task, *drawn)
    raise DataInvalid(
        f"{reference} is no data for {task}: boxes and masks are drawn on the fly, so give "
        '"shapes", "shapes:COUNT" or "shapes:COUNT:SEED"'
    )


def _drawn(reference: str | Path, default: int) -> tuple[int, int] | None:
    """Read "shapes:COUNT:SEED"; None where something else is meant."""
    name, *numbers = str(reference).split(":")
    if name != "shapes":
        return None
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise DataInvalid(f"{reference} is not shapes, shapes:COUNT or shapes:COUNT:SEED")
    count, seed = [*map(int, numbers), *(default, 0)[len(numbers) :]]
    if not _FEWEST <= count <= _SEEDS:
        raise DataInvalid(f"{reference}: the count is from {_FEWEST} to {_SEEDS}")
    return count, seed


def _classify(paths: Iterable[str], where: str) -> tuple[dict[str, str], list[Item], int]:
    kept: list[tuple[str, tuple[str, ...]]] = []
    others: Counter[str] = Counter()
    for path in paths:
        parts = PurePosixPath(path).parts
        if _hidden(parts):
            continue
        if PurePosixPath(path).suffix.lower() not in EXTENSIONS:
            others[PurePosixPath(path).suffix.lower() or "no extension"] += 1
            continue
        kept.append((path, parts))
    if not kept:
        found = ", ".join(f"{n} × {kind}" for kind, n in others.most_common(5))
        raise DataInvalid(
            f"{where} holds no images ({', '.join(EXTENSIONS)})"
            + (f"; it holds {found}" * bool(found))
        )
    # A zip often wraps everything in one folder; it says nothing.
    while all(len(parts) > 2 for _, parts in kept) and len({parts[0] for _, parts in kept}) == 1:
        kept = [(path, parts[1:]) for path, parts in kept]
    named = {parts[0].lower() for _, parts in kept if len(parts) > 2}
    split = "train" in {PARTS.get(name, "") for name in named} and all(
        len(parts) > 2 and parts[0].lower() in PARTS for _, parts in kept
    )
    real: dict[str, str] = {}
    items: list[Item] = []
    nested: list[str] = []
    for path, parts in kept:
        part = PARTS[parts[0].lower()] if split else ""
        inner = parts[1:] if split else parts
        if len(inner) < 2:
            raise DataInvalid(
                f"{where}: {path} lies in no class folder; the layout is CLASS/image.jpg, or "
                "train/CLASS/image.jpg and test/CLASS/image.jpg"
            )
        name = "/".join(parts)
        real[name] = path
        items.append(Item(name, inner[0], part))
        if len(inner) > 2:
            nested.append(path)
    if nested:
        raise DataInvalid(
            f"{where}: images lie in folders inside class folders, and it cannot be told which "
            f"folder is the class: {_some(nested)}. The layout is CLASS/image.jpg, or "
            "train/CLASS/image.jpg and test/CLASS/image.jpg"
        )
    return real, items, sum(others.values())
