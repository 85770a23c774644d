"""Images with what is true of them, decoded as in serving and split once and for all.

Three parts: *train* is what weights are fitted to and ranges calibrated on,
*choose* is what every choice is made on (the best epoch, the best candidate),
and *held-out* is touched once, for the figures that are reported.

The split depends on the data alone, never on the seed of a run: a parent that
was trained on a part must not be judged on it by a later run with another seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pollard.compress import duplicates
from pollard.compress.class_folders import FOLDER_OF, Item, some
from pollard.compress.errors import DataDamaged, DataInvalid, DiskFull, UsageInvalid
from pollard.compress.progress import Reporter
from pollard.compress.sources import ImageSource, LabelledSource, open_labelled, open_source
from pollard.compress.spec import InputSpec
from pollard.compress.truth import TaskName, Truth, boxes_in_tensor, mask_in_tensor, padded
from pollard.runtime.errors import ImageInvalid
from pollard.runtime.transforms import Pipeline

PartName = Literal["train", "choose", "held-out", "all"]

SPLIT_SEED = 20

# Shares of train, choose and held-out when the data do not say.
_SHARES = (0.6, 0.15, 0.25)

# Decoded images beyond this live in a temporary file instead of in memory.
_MEMORY_LIMIT_BYTES = 2 * 1024**3

_LISTED_FILES = 10

_USE = {"train": "is trained on", "choose": "choices are made by", "held-out": "judges"}


@dataclass(frozen=True)
class Part:
    """Images of one part, in random order."""

    name: str
    """Such as "digits/held-out"."""
    images: NDArray[np.uint8]
    """uint8 [n, height, width, channels]."""
    labels: NDArray[Any]
    """What is true of them: int64 [n], indices of classes; for detection float32
    [n, objects, 5], edges in pixels of the tensor and the class, -1 where a row is no object; for
    segmentation uint8 [n, height, width], 255 where no class is known."""
    task: TaskName = "classification"
    truths: Sequence[Truth] = ()
    """The same in pixels of the images as they were; empty for classification."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: slice) -> Part:
        """Return some of the images."""
        return dataclasses.replace(
            self,
            images=self.images[chosen],
            labels=self.labels[chosen],
            truths=self.truths[chosen],
        )

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any]]]:
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
    warnings: list[str] = field(default_factory=list)
    """What makes figures of these data doubtful, each a sentence without its full stop."""

    @property
    def task(self) -> TaskName:
        """What is true of the images: a class, boxes, or a mask."""
        return self.train.task


def load_data(
    reference: str | Path,
    takes: InputSpec | Pipeline,
    *,
    task: TaskName = "classification",
    max_train_images: int | None = None,
    validation: float | None = None,
    max_damaged_share: float = 0.05,
    reporter: Reporter | None = None,
) -> Dataset:
    """Read, decode and split a data set.

    Folders `train/` and `test/` are kept apart: one class-balanced half of
    `test/` becomes *choose*, because a parent may have seen all of `train/`,
    and the other half *held-out*; with a folder `val/`, that is *choose* and
    `test/` as a whole *held-out*. Data without such folders are split by class
    60 : 15 : 25. Who trains from scratch can take *choose* from `train/` instead,
    with ``validation``; `test/` as a whole is *held-out* then, too.

    Args:
        reference: As for :func:`pollard.compress.sources.open_source`.
        takes: What the images are made into: a model's input, or a bundle's own
            preprocessing.
        task: What is to be known of the images; decides which data there can be.
        max_train_images: Use only so many of the training images, by class.
        validation: Share of `train/`, below 1, or number of its images that become
            *choose*, by class; only of data with `train/` and `test/` and no `val/`.
        max_damaged_share: Share of files that may be undecodable.
        reporter: Told of progress and of damaged files.

    Raises:
        DataInvalid: no data, no images, one class, or too few of a class.
        UsageInvalid: the data have a validation part already, or it cannot be so large.
        DataDamaged: too many files cannot be decoded.
    """
    reporter = reporter or Reporter()
    source, classes = _open(reference, task)
    _say_passed_over(source, reporter)
    parts, how = _parts(source, classes, task, validation, max_train_images)
    pipeline = takes if isinstance(takes, Pipeline) else takes.pipeline
    decoded, damaged, digest = _decode(source, parts, pipeline, max_damaged_share, reporter)
    made = {name: _part(source, name, part, classes, task) for name, part in decoded.items()}
    for name, part in made.items() if task == "classification" else ():
        found = set(part.labels.tolist())
        if absent := [label for i, label in enumerate(classes) if i not in found]:
            raise DataInvalid(
                f"{reference}: no image that {_USE[name]} can be decoded of {some(absent)}"
                + ("; " * bool(damaged) + "; ".join(damaged[:_LISTED_FILES]))
            )
    _say_damaged(damaged, reporter)
    warnings = duplicates.find(
        {name: list(zip(part.items, part.looks, strict=True)) for name, part in decoded.items()}
    )
    for warning in warnings:
        reporter.say(f"Warning: {warning}")
    return Dataset(
        source.name,
        classes,
        made["train"],
        made["choose"],
        made["held-out"],
        digest,
        damaged,
        how,
        warnings,
    )


def part_sizes(
    reference: str | Path, task: TaskName = "classification", max_train_images: int | None = None
) -> tuple[list[str], dict[str, int]]:
    """Return the classes, and how many images each part has as :func:`load_data` splits them;
    none is decoded.

    Raises:
        DataInvalid: as for it.
    """
    source, classes = _open(reference, task)
    parts, _ = _parts(source, classes, task, None, max_train_images)
    return classes, {name: len(items) for name, items in parts.items()}


def part_items(
    reference: str | Path, part: PartName, task: TaskName = "classification"
) -> tuple[ImageSource, list[str], list[Item]]:
    """Return a source, its classes, and the images of one part as :func:`load_data` splits them.

    Raises:
        DataInvalid: as for it.
    """
    source, classes = _open(reference, task)
    parts, _ = split_items(source.items, _strata(classes, task))
    if part == "all":
        return source, classes, [item for members in parts.values() for item in members]
    return source, classes, parts[part]


def load_part(
    reference: str | Path,
    takes: InputSpec | Pipeline,
    part: PartName,
    reporter: Reporter | None = None,
    *,
    task: TaskName = "classification",
    max_damaged_share: float = 0.05,
) -> tuple[Part, list[str], list[str]]:
    """Decode one part only.

    Args:
        reference: As for :func:`load_data`, as the others.
        takes: What the images are made into.
        part: Which images.
        reporter: Told of progress and of damaged files.
        task: As for :func:`load_data`.
        max_damaged_share: Share of the part's files that may be undecodable.

    Returns:
        The part, the classes, and the files that were left out.

    Raises:
        DataInvalid, DataDamaged: as for :func:`load_data`.
    """
    reporter = reporter or Reporter()
    source, classes, items = part_items(reference, part, task)
    _say_passed_over(source, reporter)
    pipeline = takes if isinstance(takes, Pipeline) else takes.pipeline
    decoded, damaged, _ = _decode(source, {part: items}, pipeline, max_damaged_share, reporter)
    _say_damaged(damaged, reporter)
    return _part(source, part, decoded[part], classes, task), classes, damaged


def _open(reference: str | Path, task: TaskName) -> tuple[ImageSource, list[str]]:
    if task != "classification":
        labelled = open_labelled(reference, task)
        return labelled, labelled.classes
    source = open_source(reference)
    classes = sorted({item.label for item in source.items}, key=_natural)
    if len(classes) < 2:
        raise DataInvalid(
            f"{reference} holds one class only ({classes[0]}); there is nothing to classify"
        )
    return source, classes


def _parts(
    source: ImageSource,
    classes: list[str],
    task: TaskName,
    validation: float | None,
    max_train_images: int | None,
) -> tuple[dict[str, list[Item]], str]:
    parts, how = split_items(source.items, _strata(classes, task), validation)
    if max_train_images is not None and max_train_images < len(parts["train"]):
        parts["train"] = _subset(parts["train"], _strata(classes, task), max_train_images)
    return parts, how


def _strata(classes: list[str], task: TaskName) -> list[str]:
    """Return what images are told apart by where they are split: most scenes have all classes."""
    return classes if task == "classification" else [""]


def _part(
    source: ImageSource, name: str, decoded: _Decoded, classes: list[str], task: TaskName
) -> Part:
    title = f"{source.name}/{name}"
    if task == "classification":
        index = {label: i for i, label in enumerate(classes)}
        labels = np.array([index[item.label] for item in decoded.items], dtype=np.int64)
        return Part(title, decoded.images, labels)
    height, width = decoded.images.shape[1:3]
    truths = decoded.truths
    if task == "detection":
        boxes = padded([boxes_in_tensor(truth, width, height) for truth in truths])
        return Part(title, decoded.images, boxes, task, truths)
    masks = np.stack([mask_in_tensor(truth, width, height) for truth in truths])
    return Part(title, decoded.images, masks, task, truths)


def _say_passed_over(source: ImageSource, reporter: Reporter) -> None:
    for note in source.notes:
        reporter.say(note[:1].upper() + note[1:])


def _say_damaged(damaged: list[str], reporter: Reporter) -> None:
    if damaged:
        shown = "; ".join(damaged[:_LISTED_FILES])
        reporter.say(f"{len(damaged)} damaged file(s) left out: {shown}")


def stratified(
    labels: Sequence[object], shares: Sequence[float], seed: int, where: str = "the data"
) -> list[NDArray[np.int64]]:
    """Split indices so that every class keeps its share in every part.

    Args:
        labels: Label of each element.
        shares: Positive shares of the parts; they sum to 1.
        seed: Of the shuffle.
        where: What errors call the whole.

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
    rare = [
        f"{label} ({len(found)})" for label, found in by_class.items() if len(found) < len(shares)
    ]
    if rare:
        raise DataInvalid(
            f"in {where} these classes have too few images to be split into {len(shares)} parts, "
            f"at least one in each: {some(rare)}. Add images, or take the classes away"
        )
    for members in by_class.values():
        order = generator.permutation(members)
        counts = np.maximum(1, np.floor(np.array(shares) * len(members)).astype(int))
        counts[0] += len(members) - counts.sum()
        for part, piece in zip(parts, np.split(order, np.cumsum(counts)[:-1]), strict=True):
            part.extend(int(i) for i in piece)
    return [generator.permutation(np.array(part, dtype=np.int64)) for part in parts]


def split_items(
    items: Sequence[Item], classes: Sequence[str], validation: float | None = None
) -> tuple[dict[str, list[Item]], str]:
    """Assign items to "train", "choose" and "held-out", shuffled; and say how.

    Raises:
        DataInvalid: a class has too few images, or is missing in a part.
        UsageInvalid: ``validation`` is asked for that cannot be.
    """
    given: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        given[item.part].append(item)
    for name, members in given.items():
        absent = sorted(set(classes) - {item.label for item in members})
        if absent:
            raise DataInvalid(
                f"{FOLDER_OF.get(name, 'the data')} has no image of {some(absent)}, which the "
                "other parts have; each part needs every class"
            )
    train = given.get("train", [])
    if validation is not None:
        if given.keys() != {"train", "held-out"}:
            raise UsageInvalid(
                "--validation takes images from train/ where there is a test/ and no val/; these "
                "data have "
                + (
                    "a validation part of their own"
                    if "choose" in given
                    else "no such folders: of them 15 % are for validation as it is"
                )
            )
        return _with_validation(train, given["held-out"], validation)
    if not train or len(given) == 1:
        pool = train or [item for members in given.values() for item in members]
        cut = stratified([item.label for item in pool], _SHARES, SPLIT_SEED)
        names = ("train", "choose", "held-out")
        return (
            {name: [pool[i] for i in part] for name, part in zip(names, cut, strict=True)},
            f"split {'by class' if len(classes) > 1 else 'at random'}, 60 % train, 15 % choose, "
            "25 % held-out, fixed seed",
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
    halves = stratified([item.label for item in pool], (0.5, 0.5), SPLIT_SEED, FOLDER_OF[name])
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


def _with_validation(
    train: list[Item], held_out: list[Item], validation: float
) -> tuple[dict[str, list[Item]], str]:
    """Take "choose" from ``train``, by class."""
    count = validation if validation >= 1 else round(validation * len(train))
    if not 0 < count < len(train) or count != int(count):
        raise UsageInvalid(
            f"--validation {validation:g} is neither a share between 0 and 1 nor a number of the "
            f"{len(train):,} images of train/"
        )
    share = count / len(train)
    learnt, kept = stratified(
        [item.label for item in train], (1 - share, share), SPLIT_SEED, "train/"
    )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(held_out))
    return (
        {
            "train": [train[i] for i in learnt],
            "choose": [train[i] for i in kept],
            "held-out": [held_out[i] for i in order],
        },
        f"choose is {len(kept):,} images of the data's train folder, balanced by class, fixed "
        "seed; held-out its whole test folder",
    )


def _subset(items: list[Item], classes: Sequence[str], limit: int) -> list[Item]:
    if limit < len(classes):
        raise DataInvalid(f"{limit} training images are too few for {len(classes)} classes")
    share = limit / len(items)
    taken, _ = stratified([item.label for item in items], (share, 1 - share), SPLIT_SEED)
    return [items[i] for i in taken]


@dataclass
class _Decoded:
    """The images of one part that could be decoded."""

    images: NDArray[np.uint8]
    items: list[Item] = field(default_factory=list)
    looks: list[bytes] = field(default_factory=list)
    truths: list[Truth] = field(default_factory=list)


@dataclass(frozen=True)
class _Read:
    """One image, or why there is none."""

    pixels: NDArray[np.uint8] | None = None
    truth: Truth | None = None
    problem: str = ""
    stamp: bytes = b""
    look: bytes = b""


def _read(source: ImageSource, item: Item, pipeline: Pipeline) -> _Read:
    try:
        content = source.read(item)
        raw = content if isinstance(content, bytes) else content.tobytes()
        stamp = hashlib.sha256(f"{item.path}\0{item.label}\0".encode() + raw)
        made = (
            pipeline.apply(content)
            if isinstance(content, bytes)
            else pipeline.apply_pixels(content)
        )
    except ImageInvalid as error:
        return _Read(problem=f"{item.path}: {error}")
    truth = None
    if isinstance(source, LabelledSource):
        known = source.truth(item)
        stamp.update(known.tobytes())
        if known.dtype == np.uint8:
            truth = Truth(made.geometry, mask=known.astype(np.uint8))
        else:
            truth = Truth(made.geometry, boxes=known.astype(np.float64))
    pixels = np.ascontiguousarray(made.array, np.uint8)
    look = hashlib.blake2b(pixels.data, digest_size=16).digest()
    return _Read(pixels, truth, stamp=stamp.digest(), look=look)


def _decode(
    source: ImageSource,
    parts: dict[str, list[Item]],
    pipeline: Pipeline,
    max_damaged_share: float,
    reporter: Reporter,
) -> tuple[dict[str, _Decoded], list[str], str]:
    if pipeline.output_shape is None or pipeline.dtype != np.uint8:
        raise DataInvalid("the preprocessing must give uint8 images of one size")
    total = sum(len(items) for items in parts.values())
    damaged: list[str] = []
    hashes: list[bytes] = []

    def load(item: Item) -> _Read:
        return _read(source, item, pipeline)

    result: dict[str, _Decoded] = {}
    with reporter.step("Decoding images", total) as step, ThreadPoolExecutor(2) as pool:
        for name, items in parts.items():
            part = _Decoded(_allocate((len(items), *pipeline.output_shape)))
            # In slices, so that no more than one slice waits decoded.
            for start in range(0, len(items), 256):
                piece = items[start : start + 256]
                for item, read in zip(piece, pool.map(load, piece), strict=True):
                    if read.pixels is None:
                        damaged.append(read.problem)
                        continue
                    part.images[len(part.items)] = read.pixels
                    part.items.append(item)
                    part.looks.append(read.look)
                    hashes.append(read.stamp)
                    if read.truth is not None:
                        part.truths.append(read.truth)
                step.advance(len(piece))
                if len(damaged) > max_damaged_share * total:
                    raise DataDamaged(
                        f"{len(damaged)} of the first files cannot be decoded, more than "
                        f"{max_damaged_share:.0%} of {total}: "
                        + "; ".join(damaged[:_LISTED_FILES])
                        + ". Mend them, or take them away"
                    )
            part.images = part.images[: len(part.items)]
            result[name] = part
    digest = hashlib.sha256(b"".join(sorted(hashes)))
    return result, damaged, digest.hexdigest()


def _allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if int(np.prod(shape, dtype=np.int64)) <= _MEMORY_LIMIT_BYTES:
        return np.empty(shape, np.uint8)
    # The file has no name: it disappears with the last reference, whatever happens.
    with tempfile.TemporaryFile() as file:
        try:
            # A hole that the disk cannot fill later ends the process without a word.
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape, dtype=np.int64)))
        except OSError as error:
            raise DiskFull(
                f"{int(np.prod(shape, dtype=np.int64)) / 1e9:,.1f} GB of decoded images do not fit "
                f"into {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to where there is "
                "space, or take fewer --train-images"
            ) from error
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _natural(label: str) -> tuple[int, int, str]:
    # Numbers in their order, so that class "10" comes after "9".
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)


def count_by_class(part: Part, classes: Sequence[str]) -> dict[str, int]:
    """Return how many images of each class ``part`` has."""
    counts = Counter(part.labels.tolist())
    return {label: counts[i] for i, label in enumerate(classes)}
