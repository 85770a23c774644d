"""Bundles leave and arrive whole, or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from pollard.client import InvalidBundle
from pollard.client._bundle import BundleTar, BundleWriter
from pollard.runtime.archive import pack
from pollard.runtime.bundle import Bundle

BundleMaker = Callable[..., Bundle]


def test_the_tar_is_byte_for_byte_the_runtimes(make_bundle: BundleMaker) -> None:
    bundle = make_bundle()
    expected = io.BytesIO()
    pack(bundle, expected)
    tar = BundleTar.open(bundle.path)
    assert b"".join(tar.chunks(0)) == expected.getvalue()
    assert tar.total_bytes == len(expected.getvalue())
    assert tar.bundle_sha256 == bundle.digest


def test_the_tar_can_go_on_at_any_byte(make_bundle: BundleMaker) -> None:
    tar = BundleTar.open(make_bundle().path)
    whole = b"".join(tar.chunks(0))
    for offset in (0, 1, 511, 512, 513, 1500, len(whole) // 2, len(whole) - 1, len(whole)):
        assert b"".join(tar.chunks(offset, size=100)) == whole[offset:]


def test_a_flipped_bit_is_found_before_the_file_has_been_sent(
    make_bundle: BundleMaker,
) -> None:
    path = make_bundle().path / "cpu-fp32" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    sent = bytearray()
    with pytest.raises(InvalidBundle, match=r"model\.onnx"):
        sent.extend(chain.from_iterable(BundleTar.open(path.parents[1]).chunks(0, size=100)))
    assert bytes(content) not in sent


def test_a_file_of_another_size_is_found_before_anything_is_sent(make_bundle: BundleMaker) -> None:
    path = make_bundle().path / "cpu-fp32" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InvalidBundle, match=r"model\.onnx"):
        BundleTar.open(path.parents[1])


@pytest.mark.parametrize("name", ["labels.txt", "manifest.json"])
def test_a_missing_file_is_named(make_bundle: BundleMaker, name: str) -> None:
    directory = make_bundle().path
    (directory / name).unlink()
    with pytest.raises(InvalidBundle, match=name):
        BundleTar.open(directory)


def test_an_unlisted_file_is_named(make_bundle: BundleMaker) -> None:
    directory = make_bundle().path
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(InvalidBundle, match=r"notes\.txt is not listed"):
        BundleTar.open(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"files": [{"path": "../x"}]}'])
def test_an_unreadable_or_unsafe_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InvalidBundle, match=r"manifest\.json"):
        BundleTar.open(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundle, match="not a directory"):
        BundleTar.open(tmp_path / "none")


def _pieces(bundle: Bundle) -> list[tuple[str, int, bytes, int]]:
    names = ["manifest.json", *sorted(entry.path for entry in bundle.manifest.files)]
    pieces = []
    for name in names:
        content = (bundle.path / name).read_bytes()
        for offset in range(0, max(1, len(content)), 100):
            pieces.append((name, offset, content[offset : offset + 100], len(content)))
    return pieces


def _write(directory: Path, pieces: list[tuple[str, int, bytes, int]], digest: str) -> None:
    with BundleWriter(directory) as writer:
        for piece in pieces:
            writer.write(*piece)
        writer.finish(digest)


def test_what_came_in_pieces_is_the_bundle(make_bundle: BundleMaker, tmp_path: Path) -> None:
    bundle = make_bundle()
    _write(tmp_path / "pulled", _pieces(bundle), bundle.digest)
    assert Bundle.open(tmp_path / "pulled", verify=True).digest == bundle.digest


def test_an_empty_directory_is_filled(make_bundle: BundleMaker, tmp_path: Path) -> None:
    bundle = make_bundle()
    (tmp_path / "pulled").mkdir()
    _write(tmp_path / "pulled", _pieces(bundle), bundle.digest)
    assert (tmp_path / "pulled" / "manifest.json").is_file()


def test_a_directory_that_holds_something_is_left_alone(
    make_bundle: BundleMaker, tmp_path: Path
) -> None:
    bundle = make_bundle()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        _write(tmp_path, _pieces(bundle), bundle.digest)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["flip", "drop last", "drop middle", "unsafe", "other bundle"])
def test_what_is_not_the_bundle_leaves_nothing(
    make_bundle: BundleMaker, tmp_path: Path, damage: str
) -> None:
    bundle = make_bundle()
    pieces, digest = _pieces(bundle), bundle.digest
    if damage == "flip":
        name, offset, data, total = pieces[-1]
        pieces[-1] = (name, offset, bytes([data[0] ^ 1]) + data[1:], total)
    elif damage == "drop last":
        pieces.pop()
    elif damage == "drop middle":
        del pieces[len(pieces) // 2]
    elif damage == "unsafe":
        pieces.append(("../evil", 0, b"x", 1))
    else:
        digest = "0" * 64
    target = tmp_path / "out" / "pulled"
    with pytest.raises(InvalidBundle):
        _write(target, pieces, digest)
    assert list(target.parent.iterdir()) == []
