from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pollard.compress.data import load_data, stratified
from pollard.compress.errors import DataDamaged, DataInvalid, UsageInvalid
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find

SPEC = InputSpec(16, 16, 3, (0.0,) * 3, (1.0,) * 3)
Tree = Callable[..., Path]


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def test_digits_are_split_by_class_and_parts_share_no_image() -> None:
    data = load_data("digits", find("small-cnn-28").spec)
    assert data.classes == [str(i) for i in range(10)]
    assert len(data.train) + len(data.choose) + len(data.held_out) == 1797
    for part in (data.train, data.choose, data.held_out):
        counts = np.bincount(part.labels, minlength=10)
        assert counts.max() - counts.min() <= 0.1 * len(part)
        assert part.images.dtype == np.uint8
        assert part.images.shape[1:] == (28, 28, 1)
    assert data.train.images.max() == 255


def test_the_split_is_the_same_every_time() -> None:
    spec = find("small-cnn-28").spec
    one, other = load_data("digits", spec), load_data("digits", spec)
    assert one.digest == other.digest
    assert np.array_equal(one.held_out.images, other.held_out.images)


def test_class_ordered_folders_are_shuffled(write_images: Tree) -> None:
    data = load_data(write_images(per_class=20), SPEC)
    assert len(set(data.train.labels[:9].tolist())) == 3
    assert np.any(np.diff(data.train.labels) < 0)


def test_labels_belong_to_their_pictures(write_images: Tree) -> None:
    data = load_data(write_images(), SPEC)
    assert data.classes == ["blue", "green", "red"]
    strongest = data.train.images.mean(axis=(1, 2)).argmax(axis=1)  # red, green, blue
    assert np.array_equal(2 - strongest, data.train.labels)


def test_a_test_folder_is_halved_and_never_trained_on(write_images: Tree) -> None:
    data = load_data(write_images("train", "test", per_class=10), SPEC)
    assert (len(data.train), len(data.choose), len(data.held_out)) == (30, 15, 15)
    assert np.bincount(data.held_out.labels).tolist() == [5, 5, 5]
    assert "halves of its test folder" in data.split


def test_a_validation_folder_is_what_choices_are_made_on(write_images: Tree) -> None:
    data = load_data(write_images("train", "val", "test", per_class=4), SPEC)
    assert (len(data.train), len(data.choose), len(data.held_out)) == (12, 12, 12)


@pytest.mark.parametrize("asked", [0.2, 12])
def test_a_validation_part_is_taken_from_training_images_and_never_from_test(
    write_images: Tree, asked: float
) -> None:
    root = write_images("train", "test", per_class=20)
    usual, data = load_data(root, SPEC), load_data(root, SPEC, validation=asked)
    assert np.bincount(data.train.labels).tolist() == [16, 16, 16]
    assert np.bincount(data.choose.labels).tolist() == [4, 4, 4]
    learnt, choosing, tested, whole = (
        {image.tobytes() for image in images}
        for images in (
            data.train.images, data.choose.images, data.held_out.images, usual.train.images
        )
    )  # fmt: skip
    assert learnt | choosing == whole
    assert not learnt & choosing
    assert tested == {
        image.tobytes() for part in (usual.choose, usual.held_out) for image in part.images
    }
    assert np.array_equal(load_data(root, SPEC, validation=asked).choose.images, data.choose.images)


@pytest.mark.parametrize("asked", [0, -0.1, 60, 2.5])
def test_a_validation_part_that_cannot_be_is_refused(write_images: Tree, asked: float) -> None:
    with pytest.raises(UsageInvalid, match="of the 60 images of train/"):
        load_data(write_images("train", "test", per_class=20), SPEC, validation=asked)


def test_data_with_a_validation_folder_need_no_other(write_images: Tree) -> None:
    root = write_images("train", "val", "test", per_class=4)
    with pytest.raises(UsageInvalid, match="a validation part of their own"):
        load_data(root, SPEC, validation=0.1)


def test_a_zip_gives_the_same_data_as_its_folder(
    write_images: Tree, zip_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_images("train", "test", per_class=6)
    plain = load_data(folder, SPEC)
    for wrapper in ("", "wrapped/twice"):
        packed = zip_folder(folder, tmp_path / f"data{len(wrapper)}.zip", wrapper)
        data = load_data(packed, SPEC)
        assert data.digest == plain.digest
        assert np.array_equal(data.held_out.images, plain.held_out.images)


def test_a_subset_of_the_training_images_keeps_every_class(write_images: Tree) -> None:
    data = load_data(write_images("train", "test", per_class=20), SPEC, max_train_images=12)
    assert np.bincount(data.train.labels).tolist() == [4, 4, 4]
    assert len(data.held_out) == 30


def test_damaged_files_are_named_and_left_out(write_images: Tree) -> None:
    root = write_images(per_class=20)
    (root / "red" / "003.jpg").write_bytes(b"")
    broken = root / "blue" / "007.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    listener = Listener()
    data = load_data(root, SPEC, reporter=listener)
    assert sorted(entry.partition(":")[0] for entry in data.damaged) == [
        "blue/007.jpg",
        "red/003.jpg",
    ]
    assert "2 damaged" in listener.said[0]
    assert len(data.train) + len(data.choose) + len(data.held_out) == 58


def test_too_many_damaged_files_are_an_error(write_images: Tree) -> None:
    root = write_images()
    for index in range(6):
        (root / "red" / f"{index:03d}.jpg").write_bytes(b"no picture")
    with pytest.raises(DataDamaged, match="red/00"):
        load_data(root, SPEC)


def test_one_class_is_an_error(write_images: Tree) -> None:
    with pytest.raises(DataInvalid, match="one class only"):
        load_data(write_images(classes=("red",)), SPEC)


def test_no_images_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("nothing")
    with pytest.raises(DataInvalid, match=r"no images.*1 × \.txt"):
        load_data(tmp_path, SPEC)


def test_absent_data_and_files_that_are_no_zip_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="there is no data at"):
        load_data(tmp_path / "nowhere", SPEC)
    (tmp_path / "data.zip").write_bytes(b"PK but no zip")
    with pytest.raises(DataInvalid, match="not a readable zip"):
        load_data(tmp_path / "data.zip", SPEC)


def test_images_outside_of_class_folders_are_an_error(write_images: Tree) -> None:
    root = write_images()
    (root / "red" / "000.jpg").rename(root / "loose.jpg")
    with pytest.raises(DataInvalid, match=r"loose\.jpg lies in no class folder"):
        load_data(root, SPEC)


def test_folders_inside_class_folders_are_named(write_images: Tree) -> None:
    root = write_images()
    (root / "red" / "dark").mkdir()
    for number in (1, 2):
        (root / "red" / f"{number:03d}.jpg").rename(root / "red" / "dark" / f"{number}.jpg")
    with pytest.raises(DataInvalid, match=r"red/dark/1\.jpg, red/dark/2\.jpg"):
        load_data(root, SPEC)


def test_all_classes_with_too_few_images_are_named(write_images: Tree) -> None:
    root = write_images("train", "test", per_class=4)
    for label in ("blue", "red"):
        for number in (1, 2, 3):
            (root / "test" / label / f"{number:03d}.jpg").unlink()
    told = r"in test/ these classes have too few .* 2 parts, .*: blue \(1\), red \(1\)\. Add images"
    with pytest.raises(DataInvalid, match=told):
        load_data(root, SPEC)


def test_a_class_of_which_a_part_has_only_damaged_images_is_named_with_them(
    write_images: Tree,
) -> None:
    root = write_images("train", "val", "test", per_class=40)
    for path in sorted((root / "val" / "red").iterdir())[1:]:
        path.unlink()
    (root / "val" / "red" / "000.jpg").write_bytes(b"no picture")
    told = r"that choices are made by can be decoded of red; val/red/000\.jpg: .* not an image"
    with pytest.raises(DataInvalid, match=told):
        load_data(root, SPEC)


def test_decoded_images_that_fit_neither_memory_nor_disk_are_an_error(write_images: Tree) -> None:
    # A limit on the size of files stands for a full disk.
    code = """
import resource, sys
from pollard.compress import data
from pollard.compress.spec import InputSpec
data._MEMORY_LIMIT_BYTES = 0
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    data.load_data(sys.argv[1], InputSpec(16, 16, 3, (0.0,) * 3, (1.0,) * 3))
except data.DiskFull as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(write_images())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "of decoded images do not fit into" in done.stdout
    assert "TMPDIR" in done.stdout


def test_shapes_are_the_same_every_time_and_can_be_told_apart() -> None:
    spec = InputSpec(32, 32, 3, (0.0,) * 3, (1.0,) * 3)
    data = load_data("shapes", spec)
    assert data.classes == ["cross", "disc", "ring", "square", "triangle"]
    assert len(data.train) == 5 * 144
    assert data.digest == load_data("shapes", spec).digest
    assert data.train.images.std(axis=(1, 2)).max(axis=1).min() > 12


def test_a_class_missing_from_a_part_is_an_error(write_images: Tree) -> None:
    root = write_images("train", "test", per_class=4)
    for path in (root / "test" / "red").iterdir():
        path.unlink()
    with pytest.raises(DataInvalid, match="folders are empty: test/red"):
        load_data(root, SPEC)
    (root / "test" / "red" / "notes.txt").write_text("none yet")
    with pytest.raises(DataInvalid, match="no image of red"):
        load_data(root, SPEC)


@given(
    st.lists(st.sampled_from("abc"), min_size=30, max_size=120).filter(
        lambda labels: all(labels.count(c) >= 3 for c in set(labels))
    ),
    st.integers(0, 1000),
)
def test_stratified_parts_partition_the_data(labels: list[str], seed: int) -> None:
    parts = stratified(labels, (0.6, 0.15, 0.25), seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert {labels[i] for i in part} == set(labels)
