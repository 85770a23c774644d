"""Images with labels, decoded as in serving and split once and for all.

Three parts: *train* is what weights are fitted to and ranges calibrated on,
*choose* is what every choice is made on (the best epoch, the best candidate),
and *held-out* is touched once, for the figures that are reported.

The split depends on the data alone, never on the seed of a run: a parent that
was trained on a part must not be judged on it by a later run with another seed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pollard.compress.errors import DataDamaged, DataInvalid
from pollard.compress.progress import Reporter
from pollard.compress.sources import ImageSource, Item, open_source
from pollard.compress.spec import InputSpec
from pollard.runtime.errors import ImageInvalid
from pollard.runtime.transforms import Pipeline

PartName = Literal["train", "choose", "held-out", "all"]

SPLIT_SEED = 20

# Shares of train, choose and held-out when the data do not say.
_SHARES = (0.6, 0.15, 0.25)

# Decoded images beyond this live in a temporary file instead of in memory.
_MEMORY_LIMIT_BYTES = 2 * 1024**3

_LISTED_FILES = 10


@dataclass(frozen=True)
class Part:
    """Images of one part, in random order."""

    name: str
    """Such as "digits/held-out"."""
    images: NDArray[np.uint8]
    """uint8 [n, height, width, channels]."""
    labels: NDArray[np.int64]
    """int64 [n], indices of classes."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Yield consecutive batches of at most ``size`` images."""
        for start in range(0, len(self), size):
            yield self.images[start : start + size], self.labels[start : start + size]


@dataclass(frozen=True)
class Dataset:
    """A whole data set."""

    name: str
    classes: list[str]
    """Labels in the order of the classes."""
    train: Part
    choose: Part
    held_out: Part
    digest: str
    """SHA-256 over paths, labels and contents of all images used."""
    damaged: list[str] = field(default_factory=list)
    """Files that could not be decoded and were left out, each with the reason."""
    split: str = ""
    """How the parts came about, for people."""


def load_data(
    reference: str | Path,
    takes: InputSpec | Pipeline,
    *,
    max_train_images: int | None = None,
    max_damaged_share: float = 0.05,
    reporter: Reporter | None = None,
) -> Dataset:
    """Read, decode and split a data set.

    Folders `train/` and `test/` are kept apart: one class-balanced half of
    `test/` becomes *choose*, because a parent may have seen all of `train/`,
    and the other half *held-out*; with a folder `val/`, that is *choose* and
    `test/` as a whole *held-out*. Data without such folders are split by class
    60 : 15 : 25.

    Args:
        reference: "digits", a directory, or a zip file.
        takes: What the images are made into: a model's input, or a bundle's own
            preprocessing.
        max_train_images: Use only so many of the training images, by class.
        max_damaged_share: Share of files that may be undecodable.
        reporter: Told of progress and of damaged files.

    Raises:
        DataInvalid: no data, no images, one class, or too few of a class.
        DataDamaged: too many files cannot be decoded.
    """
    reporter = reporter or Reporter()
    source, classes = _open(reference)
    parts, how = split_items(source.items, classes)
    if max_train_images is not None and max_train_images < len(parts["train"]):
        parts["train"] = _subset(parts["train"], classes, max_train_images)
    decoded, damaged, digest = _decode(
        source,
        parts,
        takes if isinstance(takes, Pipeline) else takes.pipeline,
        max_damaged_share,
        reporter,
    )
    index = {label: i for i, label in enumerate(classes)}
    made: dict[str, Part] = {}
    for name, (items, images) in decoded.items():
        labels = np.array([index[item.label] for item in items], dtype=np.int64)
        absent = [label for label in classes if index[label] not in set(labels.tolist())]
        if absent:
            raise DataInvalid(
                f"{reference}: the part {name!r} has no image of {', '.join(absent[:10])}"
            )
        made[name] = Part(f"{source.name}/{name}", images, labels)
    _say_damaged(damaged, reporter)
    return Dataset(
        source.name,
        classes,
        made["train"],
        made["choose"],
        made["held-out"],
        digest,
        damaged,
        how,
    )


def part_items(reference: str | Path, part: PartName) -> tuple[ImageSource, list[str], list[Item]]:
    """Return a source, its classes, and the images of one part as :func:`load_data` splits them.

    Raises:
        DataInvalid: as for it.
    """
    source, classes = _open(reference)
    parts, _ = split_items(source.items, classes)
    if part == "all":
        return source, classes, [item for members in parts.values() for item in members]
    return source, classes, parts[part]


def load_part(
    reference: str | Path,
    takes: InputSpec | Pipeline,
    part: PartName,
    reporter: Reporter | None = None,
    *,
    max_damaged_share: float = 0.05,
) -> tuple[Part, list[str], list[str]]:
    """Decode one part only.

    Args:
        reference: As for :func:`load_data`, as the others.
        takes: What the images are made into.
        part: Which images.
        reporter: Told of progress and of damaged files.
        max_damaged_share: Share of the part's files that may be undecodable.

    Returns:
        The part, the classes, and the files that were left out.

    Raises:
        DataInvalid, DataDamaged: as for :func:`load_data`.
    """
    reporter = reporter or Reporter()
    source, classes, items = part_items(reference, part)
    pipeline = takes if isinstance(takes, Pipeline) else takes.pipeline
    decoded, damaged, _ = _decode(source, {part: items}, pipeline, max_damaged_share, reporter)
    kept, images = decoded[part]
    index = {label: i for i, label in enumerate(classes)}
    labels = np.array([index[item.label] for item in kept], dtype=np.int64)
    _say_damaged(damaged, reporter)
    return Part(f"{source.name}/{part}", images, labels), classes, damaged


def _open(reference: str | Path) -> tuple[ImageSource, list[str]]:
    source = open_source(reference)
    classes = sorted({item.label for item in source.items}, key=_natural)
    if len(classes) < 2:
        raise DataInvalid(
            f"{reference} holds one class only ({classes[0]}); there is nothing to classify"
        )
    return source, classes


def _say_damaged(damaged: list[str], reporter: Reporter) -> None:
    if damaged:
        shown = "; ".join(damaged[:_LISTED_FILES])
        reporter.say(f"{len(damaged)} damaged file(s) left out: {shown}")


def stratified(
    labels: Sequence[object], shares: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """Split indices so that every class keeps its share in every part.

    Args:
        labels: Label of each element.
        shares: Positive shares of the parts; they sum to 1.
        seed: Of the shuffle.

    Returns:
        Indices of each part, shuffled.

    Raises:
        DataInvalid: a class has fewer elements than there are parts.
    """
    generator = np.random.default_rng(seed)
    by_class: dict[object, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        by_class[label].append(i)
    parts: list[list[int]] = [[] for _ in shares]
    for label, members in by_class.items():
        if len(members) < len(shares):
            raise DataInvalid(
                f"class {label!r} has {len(members)} image(s); at least {len(shares)} are needed"
            )
        order = generator.permutation(members)
        counts = np.maximum(1, np.floor(np.array(shares) * len(members)).astype(int))
        counts[0] += len(members) - counts.sum()
        for part, piece in zip(parts, np.split(order, np.cumsum(counts)[:-1]), strict=True):
            part.extend(int(i) for i in piece)
    return [generator.permutation(np.array(part, dtype=np.int64)) for part in parts]


def split_items(items: Sequence[Item], classes: Sequence[str]) -> tuple[dict[str, list[Item]], str]:
    """Assign items to "train", "choose" and "held-out", shuffled; and say how.

    Raises:
        DataInvalid: a class has too few images, or is missing in a part.
    """
    given: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        given[item.part].append(item)
    for name, members in given.items():
        absent = sorted(set(classes) - {item.label for item in members})
        if absent:
            raise DataInvalid(f"the part {name!r} has no image of {', '.join(absent[:10])}")
    train = given.get("train", [])
    if not train or len(given) == 1:
        pool = train or [item for members in given.values() for item in members]
        cut = stratified([item.label for item in pool], _SHARES, SPLIT_SEED)
        names = ("train", "choose", "held-out")
        return (
            {name: [pool[i] for i in part] for name, part in zip(names, cut, strict=True)},
            "split by class, 60 % train, 15 % choose, 25 % held-out, fixed seed",
        )
    generator = np.random.default_rng(SPLIT_SEED)
    shuffled = {
        name: [members[i] for i in generator.permutation(len(members))]
        for name, members in given.items()
    }
    if {"choose", "held-out"} <= given.keys():
        return shuffled, "the data's own train, validation and test folders"
    name = "held-out" if "held-out" in given else "choose"
    pool = shuffled[name]
    halves = stratified([item.label for item in pool], (0.5, 0.5), SPLIT_SEED)
    folder = "test" if name == "held-out" else "validation"
    return (
        {
            "train": shuffled["train"],
            "choose": [pool[i] for i in halves[0]],
            "held-out": [pool[i] for i in halves[1]],
        },
        f"the data's own train folder; choose and held-out are halves of its {folder} folder, "
        "balanced by class, fixed seed",
    )


def _subset(items: list[Item], classes: Sequence[str], limit: int) -> list[Item]:
    if limit < len(classes):
        raise DataInvalid(f"{limit} training images are too few for {len(classes)} classes")
    share = limit / len(items)
    taken, _ = stratified([item.label for item in items], (share, 1 - share), SPLIT_SEED)
    return [items[i] for i in taken]


def _decode(
    source: ImageSource,
    parts: dict[str, list[Item]],
    pipeline: Pipeline,
    max_damaged_share: float,
    reporter: Reporter,
) -> tuple[dict[str, tuple[list[Item], NDArray[np.uint8]]], list[str], str]:
    if pipeline.output_shape is None or pipeline.dtype != np.uint8:
        raise DataInvalid("the preprocessing must give uint8 images of one size")
    total = sum(len(items) for items in parts.values())
    damaged: list[str] = []
    hashes: list[bytes] = []

    def load(item: Item) -> tuple[NDArray[np.uint8] | None, str, bytes]:
        try:
            content = source.read(item)
            raw = content if isinstance(content, bytes) else content.tobytes()
            stamp = hashlib.sha256(f"{item.path}\0{item.label}\0".encode() + raw).digest()
            if isinstance(content, bytes):
                return np.asarray(pipeline.apply(content).array, np.uint8), "", stamp
            return np.asarray(pipeline.apply_pixels(content).array, np.uint8), "", stamp
        except ImageInvalid as error:
            return None, f"{item.path}: {error}", b""

    result: dict[str, tuple[list[Item], NDArray[np.uint8]]] = {}
    with reporter.step("Decoding images", total) as step, ThreadPoolExecutor(2) as pool:
        for name, items in parts.items():
            store = _allocate((len(items), *pipeline.output_shape))
            kept: list[Item] = []
            # In slices, so that no more than one slice waits decoded.
            for start in range(0, len(items), 256):
                piece = items[start : start + 256]
                for item, (pixels, problem, stamp) in zip(
                    piece, pool.map(load, piece), strict=True
                ):
                    if pixels is None:
                        damaged.append(problem)
                    else:
                        store[len(kept)] = pixels
                        kept.append(item)
                        hashes.append(stamp)
                step.advance(len(piece))
                if len(damaged) > max_damaged_share * total:
                    raise DataDamaged(
                        f"{len(damaged)} of the first files cannot be decoded, more than "
                        f"{max_damaged_share:.0%} of {total}: " + "; ".join(damaged[:_LISTED_FILES])
                    )
            result[name] = (kept, store[: len(kept)])
    digest = hashlib.sha256(b"".join(sorted(hashes)))
    return result, damaged, digest.hexdigest()


def _allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if int(np.prod(shape, dtype=np.int64)) <= _MEMORY_LIMIT_BYTES:
        return np.empty(shape, np.uint8)
    # The file has no name: it disappears with the last reference, whatever happens.
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _natural(label: str) -> tuple[int, int, str]:
    # Numbers in their order, so that class "10" comes after "9".
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def count_by_class(part: Part, classes: Sequence[str]) -> dict[str, int]:
    """Return how many images of each class ``part`` has."""
    counts = Counter(part.labels.tolist())
    return {label: counts[i] for i, label in enumerate(classes)}
