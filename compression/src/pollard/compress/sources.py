"""Where images come from: directories, zip files and scikit-learn's digits."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.compress.errors import DataInvalid
from pollard.runtime.errors import ImageDamaged, ImageTooLarge
from pollard.runtime.images import ImageLimits

EXTENSIONS = (".jpg", ".jpeg", ".png")

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


class DirectorySource:
    """A directory of `CLASS/*.jpg`, or of `train/CLASS/*.jpg` and `test/CLASS/*.jpg`."""

    def __init__(self, root: Path) -> None:
        self.name = root.name or str(root)
        self.root = root
        paths: list[str] = []
        for directory, names, files in os.walk(root):
            names.sort()
            below = Path(directory).relative_to(root)
            paths.extend((below / file).as_posix() for file in sorted(files))
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


def _enlarge(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    # 16 grey levels in the original; bicubic keeps the strokes crisp.
    levels = np.round(image * (255.0 / 16.0)).astype(np.uint8)
    return np.asarray(Image.fromarray(levels).resize((28, 28), Image.Resampling.BICUBIC))


def open_source(reference: str | Path) -> ImageSource:
    """Find a data set.

    Args:
        reference: "digits", a directory, or a zip file.

    Raises:
        DataInvalid: there is none, or it holds no images.
    """
    if str(reference) == "digits":
        return DigitsSource()
    path = Path(reference)
    if path.is_dir():
        return DirectorySource(path)
    if path.is_file():
        return ZipSource(path)
    raise DataInvalid(
        f'there is no data at {path}: give "digits", a directory or a zip file with '
        "train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg"
    )


def _classify(paths: Iterable[str], where: str) -> tuple[dict[str, str], list[Item], int]:
    kept: list[tuple[str, tuple[str, ...]]] = []
    others: Counter[str] = Counter()
    for path in paths:
        parts = PurePosixPath(path).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
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
    return real, items, sum(others.values())
