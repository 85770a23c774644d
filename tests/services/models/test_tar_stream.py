"""The structure of a tar, byte by byte: the same files whatever the pieces, and no traps."""

from __future__ import annotations

import io
import random
import tarfile
from typing import Any

import pytest

from pollard.runtime.bundle import MANIFEST, MAX_SIGNATURE_BYTES, SIGNATURE
from pollard.services.common.errors import InvalidRequest
from pollard.services.models.tar_stream import TarStream

LONG = "deep/" * 40 + "model.onnx"


def tar_of(*members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def header_of(name: str, size: int = 0, **more: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def extended(record: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header_of("x", len(record), type=kind) + record.ljust(512, b"\0")


def follow(tar: bytes, sizes: Any = None, **limits: int) -> tuple[dict[str, bytes], TarStream]:
    """Feed a tar in pieces; return the files that it holds."""
    stream = TarStream(**({"max_files": 100, "max_total_bytes": 1 << 30} | limits))
    found: dict[str, bytes] = {}
    path, rest = "", memoryview(tar)
    while rest:
        piece = rest[: sizes() if sizes else len(rest)]
        rest = rest[len(piece) :]
        while piece:
            if stream.content_left:
                taken = piece[: stream.content_left]
                found[path] += bytes(taken)
                stream.content_left -= len(taken)
                piece = piece[len(taken) :]
                continue
            count, member = stream.take(piece)
            assert count > 0
            piece = piece[count:]
            if member is not None:
                path = member.path
                found[path] = b""
    return found, stream


FILES = (
    (MANIFEST, b"{}" * 300),
    ("empty", b""),
    ("exactly/one/block", b"b" * 512),
    (LONG, bytes(range(256)) * 5),
    ("größe.txt", b"x"),
)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_files_are_those_of_the_tar_whatever_the_pieces(form: int) -> None:
    tar = tar_of(*FILES, form=form)
    chance = random.Random(3)
    for sizes in (None, lambda: 1, lambda: 511, lambda: chance.randrange(1, 2000)):
        found, stream = follow(tar, sizes)
        assert found == dict(FILES)
        assert stream.ended


def test_a_tar_that_ends_early_has_not_ended() -> None:
    tar = tar_of(*FILES)
    whole = tar.rstrip(b"\0")
    assert not follow(whole)[1].ended
    # One block of zeros ends it, as every reader of tars takes it.
    assert follow(tar_of(("a", b""))[: 2 * 512])[1].ended


@pytest.mark.parametrize(
    ("tar", "words"),
    [
        (b"not a tar at all" * 100, "not a readable"),
        (header_of("a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a regular file"),
        (header_of("a", type=tarfile.LNKTYPE, linkname=MANIFEST), "not a regular file"),
        (header_of("a", type=tarfile.FIFOTYPE), "not a regular file"),
        (header_of("a", type=tarfile.CHRTYPE), "not a regular file"),
        (header_of("a", type=tarfile.CONTTYPE), "not a regular file"),
        (header_of("a", type=tarfile.GNUTYPE_SPARSE), "not a regular file"),
        (header_of("a", type=b"M"), "not a regular file"),
        (header_of("d", 5, type=tarfile.DIRTYPE), "not a regular file"),
        (header_of("../escaped"), "not a safe path"),
        (header_of("/etc/passwd"), "not a safe path"),
        (header_of("a/../../b"), "not a safe path"),
        (header_of("a//b"), "not a safe path"),
        (header_of("a\\b"), "not a safe path"),
        (header_of("../d", type=tarfile.DIRTYPE), "not a regular file"),
        (header_of("a") + header_of("./a"), "occurs twice"),
        (header_of("a", 1 << 40), "more than 1073741824 bytes"),
        (header_of(MANIFEST, 50 << 20), "has 52428800 bytes, more than"),
        (header_of(SIGNATURE, MAX_SIGNATURE_BYTES + 1), "more than"),
        (header_of("x", 1 << 20, type=tarfile.XHDTYPE), "extended attributes"),
        (header_of("x", 1 << 20, type=tarfile.GNUTYPE_LONGNAME), "extended attributes"),
        (extended(b"99 path=../escaped\n"), "a length is wrong"),
        (extended(b"22 GNU.sparse.size=1\n\n"), "not a regular file"),
        (extended(b"no number"), "malformed"),
        (extended(b"-3 a=\n-3 "), "malformed"),
        (extended(b"11 path=ab\n", tarfile.XGLTYPE), "for all files"),
        (bytes(512) + b"more", "follows the end"),
        (bytes(2 << 20), "follows the end"),
    ],
)
def test_what_no_bundle_holds_is_refused(tar: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        follow(tar)
    assert caught.value.reason == "ARCHIVE_INVALID"


def test_an_attribute_cannot_smuggle_a_path_or_a_size() -> None:
    with pytest.raises(InvalidRequest, match="not a safe path"):
        follow(extended(b"25 path=../../etc/passwd\n") + header_of("harmless"))
    with pytest.raises(InvalidRequest, match="-10 bytes"):
        follow(extended(b"12 size=-10\n") + header_of("harmless", 5))


def test_no_more_files_than_allowed() -> None:
    tar = tar_of(*((f"f{number}", b"") for number in range(4)))
    assert len(follow(tar, max_files=4)[0]) == 4
    with pytest.raises(InvalidRequest, match="more than 3 files"):
        follow(tar, max_files=3)


def test_random_bytes_are_refused_and_nothing_else_happens() -> None:
    chance = random.Random(5)
    good = bytearray(tar_of(*FILES))
    refused = 0
    for _ in range(300):
        broken = bytearray(good)
        for _ in range(chance.randrange(1, 8)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            follow(bytes(broken), lambda: 1000)
        except InvalidRequest:
            refused += 1
    assert refused > 100
