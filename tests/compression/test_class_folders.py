from __future__ import annotations

import io
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pollard.compress.class_folders import walk
from pollard.compress.errors import DataInvalid
from pollard.compress.sources import ImageSource, open_source
from pollard.runtime.errors import ImageDamaged, ImageTooLarge
from pollard.runtime.images import FORMATS

Tree = Callable[..., Path]


def labels(source: ImageSource) -> dict[str, int]:
    found = [item.label for item in source.items]
    return {label: found.count(label) for label in sorted(set(found))}


def packed(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return path


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        ("JPEG", ".JPG"), ("JPEG", ".jfif"), ("PNG", ".png"), ("WebP", ".webp"), ("GIF", ".gif"),
        ("TIFF", ".tif"), ("TIFF", ".tiff"), ("BMP", ".bmp"), ("AVIF", ".avif"),
    ],
)  # fmt: skip
def test_what_is_served_is_trained_on(write_images: Tree, form: str, suffix: str) -> None:
    if form not in FORMATS:
        pytest.skip(f"Pillow was built without {form}")
    root = write_images(per_class=2)
    (root / "red" / f"more{suffix}").write_bytes(encoded(form))
    source = open_source(root)
    assert labels(source) == {"blue": 2, "green": 2, "red": 3}
    assert source.notes == []
    (item,) = (item for item in source.items if "more" in item.path)
    assert source.read(item) == encoded(form)


def test_files_that_are_no_images_are_counted_and_rubbish_is_not(write_images: Tree) -> None:
    root = write_images(per_class=2)
    for name in ("notes.txt", "red/a.heic", "red/b.heic", "red/Thumbs.db", ".DS_Store"):
        (root / name).write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._0.jpg").write_bytes(b"x")
    source = open_source(root)
    assert labels(source) == {"blue": 2, "green": 2, "red": 2}
    assert source.notes == [
        "3 file(s) that are no images were passed over: 2 × .heic, 1 × .txt",
    ]


def test_a_class_of_pictures_that_are_not_read_is_an_error(write_images: Tree) -> None:
    root = write_images(per_class=2)
    (root / "white").mkdir()
    (root / "white" / "0.heic").write_bytes(b"x")
    with pytest.raises(DataInvalid, match=r"no image that is read: white \(1 × \.heic\)\. Convert"):
        open_source(root)


def test_folders_of_other_files_are_named(write_images: Tree) -> None:
    root = write_images("train", "test", per_class=2)
    (root / "train" / "annotations").mkdir()
    (root / "train" / "annotations" / "0.xml").write_bytes(b"x")
    assert open_source(root).notes == [
        "1 file(s) that are no images were passed over: 1 × .xml",
        "folders without images are no classes: train/annotations",
    ]


def test_a_class_that_holds_rubbish_only_is_empty(write_images: Tree) -> None:
    root = write_images(per_class=2)
    (root / "white").mkdir()
    (root / "white" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(DataInvalid, match="folders are empty: white"):
        open_source(root)


def test_links_to_class_folders_are_followed(write_images: Tree) -> None:
    other = write_images(per_class=5, classes=("red",), name="elsewhere")
    root = write_images(per_class=2, classes=("blue", "green"))
    (root / "red").symlink_to(other / "red")
    assert labels(open_source(root)) == {"blue": 2, "green": 2, "red": 5}


def test_links_in_a_ring_are_passed_over_and_told(write_images: Tree) -> None:
    root = write_images(per_class=2)
    (root / "red" / "up").symlink_to(root)
    (root / "again").symlink_to(root)
    source = open_source(root)
    assert labels(source) == {"blue": 2, "green": 2, "red": 2}
    (note,) = source.notes
    assert note.endswith("passed over: again, red/up")


def test_a_class_folder_that_is_a_dead_link_is_an_error(write_images: Tree) -> None:
    root = write_images(per_class=2)
    (root / "white").symlink_to(root / "nowhere")
    with pytest.raises(DataInvalid, match="links lead nowhere: white"):
        open_source(root)


def test_dead_links_to_images_are_damaged_images(write_images: Tree) -> None:
    root = write_images(per_class=2)
    (root / "red" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    source = open_source(root)
    (item,) = (item for item in source.items if "gone" in item.path)
    with pytest.raises(ImageDamaged, match="No such file"):
        source.read(item)


def test_a_pipe_and_a_file_without_end_are_not_read(write_images: Tree) -> None:
    root = write_images(per_class=2)
    os.mkfifo(root / "red" / "pipe.jpg")
    with (root / "red" / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)
    source = open_source(root)
    items = {Path(item.path).stem: item for item in source.items}
    with pytest.raises(ImageDamaged, match="no file"):
        source.read(items["pipe"])
    with pytest.raises(ImageTooLarge, match=r"1,099,511,627,776 bytes"):
        source.read(items["huge"])


def test_names_that_are_not_utf8_are_told_in_characters(write_images: Tree) -> None:
    root = write_images(per_class=2)
    old, new = os.fsencode(root / "red" / "000.jpg"), os.fsencode(root / "red") + b"/\xff.jpg"
    os.rename(old, new)
    source = open_source(root)
    (item,) = (item for item in source.items if "\\" in item.path)
    assert item.path == "red/\\xff.jpg"
    assert isinstance(source.read(item), bytes)


@pytest.mark.parametrize(
    ("name", "told"),
    [(b"\xff", r"class folder \\xff is not called in UTF-8"), (b"a\nb", "a line break in it")],
)
def test_classes_that_no_file_of_labels_can_hold_are_refused(
    write_images: Tree, name: bytes, told: str
) -> None:
    root = write_images(per_class=2)
    os.rename(os.fsencode(root / "red"), os.fsencode(root) + b"/" + name)
    with pytest.raises(DataInvalid, match=told):
        open_source(root)


def test_a_class_is_one_however_its_accents_are_written(tmp_path: Path) -> None:
    one, other = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert one != other
    names = [f"train/{one}/0.jpg", "train/b/0.jpg", f"test/{other}/0.jpg", "test/b/0.jpg"]
    assert labels(open_source(packed(tmp_path / "data.zip", *names))) == {"b": 2, one: 2}


def test_other_names_of_parts_are_known(tmp_path: Path) -> None:
    names = [f"{part}/{label}/0.jpg" for part in ("Training", "dev", "TESTING") for label in "ab"]
    source = open_source(packed(tmp_path / "data.zip", *names))
    assert {item.part for item in source.items} == {"train", "choose", "held-out"}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train/0.jpg", "test/0.jpg"], "images lie directly in test/ and train/"),
        (
            ["train/a/0.jpg", "train/b/0.jpg", "test/0.jpg"],
            r"directly in test/, .* what they show: test/0\.jpg",
        ),
        (
            ["train/a/0.jpg", "train/b/0.jpg", "test/a/0.jpg", "unlabelled/x/0.jpg"],
            r"in no part of the data: unlabelled/x/0\.jpg",
        ),
        (["train/a/0.jpg", "train/b/0.jpg", "one.jpg"], r"in no part of the data: one\.jpg"),
        (["inner.zip"], "it holds 1 × .zip. Unpack"),
    ],
)
def test_what_might_be_misunderstood_is_an_error(
    tmp_path: Path, names: list[str], told: str
) -> None:
    with pytest.raises(DataInvalid, match=told):
        open_source(packed(tmp_path / "data.zip", *names))


def test_zips_may_have_backslashes_and_files_twice(tmp_path: Path) -> None:
    names = ["a\\0.jpg", "a\\1.jpg", "b\\0.jpg"]
    source = open_source(packed(tmp_path / "data.zip", *names))
    assert labels(source) == {"a": 2, "b": 1}
    assert source.read(source.items[0]) == b"x"
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = packed(tmp_path / "twice.zip", "a/0.jpg", "a/0.jpg", "b/0.jpg")
    assert labels(open_source(twice)) == {"a": 1, "b": 1}


def test_hidden_folders_are_not_even_looked_into(write_images: Tree) -> None:
    root = write_images(per_class=1)
    (root / ".git" / "empty").mkdir(parents=True)
    paths, notes = walk(root)
    assert paths == ["blue/000.jpg", "green/000.jpg", "red/000.jpg"]
    assert notes == []
