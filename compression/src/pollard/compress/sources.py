"""Where images come from: directories, zip files, scikit-learn's digits, drawn shapes."""

from __future__ import annotations

import functools
import zipfile
import zlib
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.compress import shapes
from pollard.compress.class_folders import Item, classify, is_regular, walk
from pollard.compress.errors import DataInvalid
from pollard.compress.truth import TaskName
from pollard.runtime.errors import ImageDamaged, ImageTooLarge
from pollard.runtime.images import ImageLimits

# Images that may be drawn, and how far the seeds of two data sets lie apart.
_FEWEST, _SEEDS = 20, 1_000_000


class ImageSource(Protocol):
    """A data set before anything is decoded."""

    name: str
    items: list[Item]
    notes: list[str]
    """What was passed over, each a sentence without its full stop."""

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
        paths, passed = walk(root)
        layout = classify(paths, str(root))
        self._real, self.items = layout.real, layout.items
        self.notes = [*passed, *layout.notes]

    def read(self, item: Item) -> bytes:
        """Return the bytes of the file, never more than an image may have."""
        path = self.root / self._real[item.path]
        try:
            if not is_regular(path):
                raise ImageDamaged("it is no file")
            _check_bytes(path.stat().st_size)
            return path.read_bytes()
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
            raise DataInvalid(
                f"{path} is not a readable zip file: {error}. Data are a directory or a zip; "
                "unpack archives of other kinds"
            ) from error
        # Of several files of one name the last counts, as it does where they are unpacked.
        layout = classify(dict.fromkeys(paths), str(path))
        self._real, self.items, self.notes = layout.real, layout.items, layout.notes

    def read(self, item: Item) -> bytes:
        """Return the bytes of the file, never more than an image may have."""
        info = self._zip.getinfo(self._real[item.path])
        _check_bytes(info.file_size)
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
        self.notes: list[str] = []
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
        self.notes: list[str] = []
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
        self.notes: list[str] = []
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


def _check_bytes(count: int) -> None:
    limit = ImageLimits().max_bytes
    if count > limit:
        raise ImageTooLarge(f"it has {count:,} bytes, at most {limit:,} are allowed")


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
