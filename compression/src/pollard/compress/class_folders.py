"""Which files of a directory or a zip are images of which class and part, and what is passed over.

The layout is `CLASS/*.jpg`, or `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. Whatever might
make a class or a part other than what was meant is an error that names the files; what is
passed over is told.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pollard.compress.errors import DataInvalid

# As `pollard.runtime.images` reads them; the content decides in the end.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"),
    ".avif",
)

# Pictures that nothing here reads: a folder of nothing else was meant as a class.
_OTHER_PICTURES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".ico", ".tga"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".eps", ".pcx", ".dcm", ".npy"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".raw"),
    }
)

# Folder names that say which part of the data they hold.
PARTS = {
    "train": "train",
    "training": "train",
    "val": "choose",
    "valid": "choose",
    "validation": "choose",
    "dev": "choose",
    "test": "held-out",
    "testing": "held-out",
}

FOLDER_OF = {"train": "train/", "choose": "val/", "held-out": "test/"}
"""What a part's folder is called where people are told of it."""

_LAYOUT = "CLASS/image.jpg, or train/CLASS/image.jpg and test/CLASS/image.jpg"

# What systems leave everywhere, beside all that begins with a dot.
_RUBBISH = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "lost+found"})


@dataclass(frozen=True)
class Item:
    """One image of a data set."""

    path: str
    """Path within the data set, in characters that can be printed; for digits, its number."""
    label: str
    part: str
    """"train", "choose" or "held-out" when the data say so; else empty."""


@dataclass(frozen=True)
class Layout:
    """The images of a directory or a zip."""

    real: dict[str, str]
    """Path of an item → what the file system or the zip calls it."""
    items: list[Item]
    notes: list[str] = field(default_factory=list)
    """What was passed over, each a sentence without its full stop."""


def some(names: Iterable[str]) -> str:
    """Return the first ten names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return ", ".join(listed[:10]) + more


def printable(path: str) -> str:
    """Return a file's name with what is no character written as ``\\xff``."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def walk(root: Path) -> tuple[list[str], list[str]]:
    """Find the files below a directory, through links to folders as well.

    Returns:
        Their paths from there, and notes of what was passed over.

    Raises:
        DataInvalid: a folder cannot be read or is empty, or a link leads nowhere.
    """
    paths: list[str] = []
    empty: list[str] = []
    loops: list[str] = []
    dangling: list[str] = []
    unreadable: list[str] = []

    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename} ({error.strerror})")

    above: dict[str, frozenset[tuple[int, int]]] = {str(root): frozenset({_identity(root)})}
    for directory, names, files in os.walk(root, onerror=note, followlinks=True):
        known = above.pop(directory)
        below = Path(directory).relative_to(root)
        kept: list[str] = []
        for name in sorted(names):
            if _hidden([name]):
                continue
            inner = os.path.join(directory, name)
            identity = _identity(Path(inner))
            if identity in known:
                loops.append(printable((below / name).as_posix()))
                continue
            above[inner] = known | {identity}
            kept.append(name)
        names[:] = kept
        seen = [name for name in sorted(files) if not _hidden([name])]
        paths.extend((below / name).as_posix() for name in seen)
        dangling.extend(
            printable((below / name).as_posix())
            for name in seen
            if not _is_image(name) and not os.path.exists(os.path.join(directory, name))
        )
        if not kept and not seen:
            empty.append(printable(below.as_posix()))
    if unreadable:
        raise DataInvalid(f"{root}: these folders cannot be read: {some(unreadable)}")
    if dangling:
        raise DataInvalid(
            f"{root}: these links lead nowhere: {some(dangling)}. Mend them, or take them away"
        )
    if empty and paths:
        raise DataInvalid(
            f"{root}: these folders are empty: {some(empty)}. A class needs images; take the "
            "folders away, or fill them"
        )
    told = f"folders that lead back to one above them were passed over: {some(loops)}"
    return paths, [told] if loops else []


def classify(paths: Iterable[str], where: str) -> Layout:
    """Tell the class and the part of every image.

    Args:
        paths: Of all files, with slashes.
        where: What errors call the whole.

    Raises:
        DataInvalid: there are no images, or it cannot be told what is a class.
    """
    kept: list[tuple[str, tuple[str, ...]]] = []
    others: list[tuple[str, ...]] = []
    for path in paths:
        parts = PurePosixPath(path.replace("\\", "/") if "/" not in path else path).parts
        if _hidden(parts):
            continue
        if _is_image(parts[-1]):
            kept.append((path, parts))
        else:
            others.append(parts)
    if not kept:
        raise DataInvalid(_no_images(others, where))
    # A zip often wraps everything in one folder; it says nothing.
    while all(len(parts) > 2 for _, parts in kept) and len({parts[0] for _, parts in kept}) == 1:
        others = [parts[1:] for parts in others if parts[0] == kept[0][1][0]]
        kept = [(path, parts[1:]) for path, parts in kept]
    split = _has_parts(kept, where)
    real: dict[str, str] = {}
    items: list[Item] = []
    nested: list[str] = []
    for path, parts in kept:
        part = PARTS[parts[0].lower()] if split else ""
        inner = parts[1:] if split else parts
        if len(inner) < 2:
            raise DataInvalid(
                f"{where}: {printable(path)} lies in no class folder; the layout is {_LAYOUT}"
            )
        name = printable("/".join(parts))
        real[name] = path
        # Some systems compose letters and their accents, others do not.
        items.append(Item(name, unicodedata.normalize("NFC", inner[0]), part))
        if len(inner) > 2:
            nested.append(printable(path))
    if nested:
        raise DataInvalid(
            f"{where}: images lie in folders inside class folders, and it cannot be told which "
            f"folder is the class: {some(nested)}. The layout is {_LAYOUT}"
        )
    _check_labels({item.label for item in items}, where)
    notes = _passed_over(others, {parts[:-1] for _, parts in kept}, 2 if split else 1, where)
    return Layout(real, items, notes)


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # the walk tells why it cannot be read
        return (-1, hash(path))
    return (found.st_dev, found.st_ino)


def is_regular(path: Path) -> bool:
    """Say whether a path leads to a file with content, not to a pipe or a device."""
    return stat.S_ISREG(path.stat().st_mode)


def _hidden(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part.lower() in _RUBBISH for part in parts)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def _kinds(files: Iterable[tuple[str, ...]]) -> str:
    counts = Counter(PurePosixPath(parts[-1]).suffix.lower() or "no extension" for parts in files)
    return ", ".join(f"{n} × {printable(kind)}" for kind, n in counts.most_common(5))


def _no_images(others: list[tuple[str, ...]], where: str) -> str:
    told = f"{where} holds no images ({', '.join(EXTENSIONS)})"
    if others:
        told += f"; it holds {_kinds(others)}"
    if any(PurePosixPath(parts[-1]).suffix.lower() in (".zip", ".tar", ".gz") for parts in others):
        told += ". Unpack what is packed twice"
    return told


def _has_parts(kept: list[tuple[str, tuple[str, ...]]], where: str) -> bool:
    """Say whether the outermost folders are parts.

    Raises:
        DataInvalid: some are and others are not, or there is none within them.
    """
    first: dict[str, list[str]] = defaultdict(list)
    flat: dict[str, list[str]] = defaultdict(list)
    for path, parts in kept:
        (first if len(parts) > 2 else flat)[parts[0]].append(printable(path))
    parts_of = {name: PARTS.get(name.lower(), "") for name in first}
    if "train" not in parts_of.values():
        if not first and flat and all(name.lower() in PARTS for name in flat):
            raise DataInvalid(
                f"{where}: images lie directly in {_folders(flat)}, not in class folders, so that "
                f"nothing says what they show; the layout is {_LAYOUT}"
            )
        return False
    unknown = sorted({name for name, part in parts_of.items() if not part})
    strange = {
        name: files for name, files in flat.items() if name.lower() not in PARTS
    } | {name: first[name] for name in unknown}  # fmt: skip
    if strange:
        raise DataInvalid(
            f"{where}: beside train/ lie images that are in no part of the data: "
            f"{some(files[0] for files in strange.values())}. Parts are called "
            f"{', '.join(PARTS)}; move the others away"
        )
    if flat:
        raise DataInvalid(
            f"{where}: images lie directly in {_folders(flat)}, not in class folders, so that "
            f"nothing says what they show: {some(f for files in flat.values() for f in files)}. "
            "Sort them into classes, or move them away"
        )
    return True


def _folders(names: Iterable[str]) -> str:
    return " and ".join(f"{printable(name)}/" for name in sorted(names))


def _check_labels(labels: set[str], where: str) -> None:
    """Refuse names that labels.txt, with one a line, cannot hold."""
    for label in sorted(labels):
        told = printable(label)
        if told != label:
            raise DataInvalid(f"{where}: the class folder {told} is not called in UTF-8; rename it")
        if label.splitlines() != [label]:
            raise DataInvalid(
                f"{where}: the name of the class folder {label!r} has a line break in it; rename it"
            )


def _passed_over(
    others: list[tuple[str, ...]], folders: set[tuple[str, ...]], depth: int, where: str
) -> list[str]:
    """Tell of files that are no images.

    Args:
        others: Paths of the files.
        folders: Those that hold images.
        depth: Number of folders that an image of a class lies in.
        where: What errors call the whole.

    Raises:
        DataInvalid: what was meant as a class has pictures of other kinds only.
    """
    if not others:
        return []
    bare: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for parts in others:
        if len(parts) > depth and parts[:depth] not in folders:
            bare[parts[:depth]].append(parts)
    lost = {
        "/".join(folder): files
        for folder, files in bare.items()
        if any(PurePosixPath(parts[-1]).suffix.lower() in _OTHER_PICTURES for parts in files)
    }
    if lost:
        told = some(f"{printable(name)} ({_kinds(files)})" for name, files in sorted(lost.items()))
        raise DataInvalid(
            f"{where}: these folders hold no image that is read: {told}. Convert them, to JPEG or "
            "PNG for example, or take the folders away"
        )
    notes = [f"{len(others):,} file(s) that are no images were passed over: {_kinds(others)}"]
    if bare:
        names = some(sorted(printable("/".join(folder)) for folder in bare))
        notes.append(f"folders without images are no classes: {names}")
    return notes
