from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pollard.runtime.archive import ArchiveLimits, pack, unpack
from pollard.runtime.errors import ArchiveInvalid, BundleCorrupt, BundleError


def _packed(bundle) -> bytes:
    buffer = io.BytesIO()
    pack(bundle, buffer)
    return buffer.getvalue()


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def test_a_bundle_survives_packing_and_unpacking(make_bundle, tmp_path: Path):
    bundle = make_bundle()
    raw = _packed(bundle)
    again = unpack(io.BytesIO(raw), tmp_path / "out")
    assert again.digest == bundle.digest
    assert _packed(again) == raw


def test_any_flipped_bit_in_the_tar_is_refused_or_harmless(make_bundle, tmp_path: Path):
    bundle = make_bundle()
    raw = _packed(bundle)
    for index in range(0, len(raw), len(raw) // 40):
        bad = bytearray(raw)
        bad[index] ^= 0x04
        out = tmp_path / f"out{index}"
        try:
            again = unpack(io.BytesIO(bytes(bad)), out)
        except BundleError:
            assert not out.exists()
        else:
            # Padding, and header fields that are not taken over, carry nothing.
            again.verify()


@pytest.mark.parametrize("length", [0, 100, 512, 700, 3000])
def test_a_truncated_tar_is_refused_and_leaves_nothing(make_bundle, tmp_path: Path, length: int):
    raw = _packed(make_bundle())[:length]
    with pytest.raises(BundleError):
        unpack(io.BytesIO(raw), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil"])  # noqa: S108 - a hostile name, nothing is written
def test_unsafe_member_names_are_refused(tmp_path: Path, name: str):
    with pytest.raises(ArchiveInvalid):
        unpack(_tar((tarfile.TarInfo(name), b"x")), tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_regular_files_are_refused(tmp_path: Path, kind: bytes):
    info = tarfile.TarInfo("link")
    info.type = kind
    info.linkname = "/etc/passwd"
    with pytest.raises(ArchiveInvalid, match="regular file"):
        unpack(_tar((info, b"")), tmp_path / "out")


def test_a_member_that_occurs_twice_is_refused(tmp_path: Path):
    twice = [(tarfile.TarInfo("a"), b"1"), (tarfile.TarInfo("a"), b"2")]
    with pytest.raises(ArchiveInvalid, match="twice"):
        unpack(_tar(*twice), tmp_path / "out")


def test_a_file_below_a_file_is_refused(tmp_path: Path):
    with pytest.raises(ArchiveInvalid, match="below a file"):
        unpack(_tar((tarfile.TarInfo("a"), b"1"), (tarfile.TarInfo("a/b"), b"2")), tmp_path / "out")


def test_limits_on_files_and_bytes(make_bundle, tmp_path: Path):
    raw = _packed(make_bundle())
    with pytest.raises(ArchiveInvalid, match="files"):
        unpack(io.BytesIO(raw), tmp_path / "a", ArchiveLimits(max_files=2))
    with pytest.raises(ArchiveInvalid, match="bytes"):
        unpack(io.BytesIO(raw), tmp_path / "b", ArchiveLimits(max_total_bytes=1000))


def test_a_compressed_tar_is_refused(make_bundle, tmp_path: Path):
    import gzip

    with pytest.raises(ArchiveInvalid, match="uncompressed"):
        unpack(io.BytesIO(gzip.compress(_packed(make_bundle()))), tmp_path / "out")


def test_what_is_not_listed_is_refused(make_bundle, tmp_path: Path):
    buffer = io.BytesIO(_packed(make_bundle()))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        info = tarfile.TarInfo("extra.py")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    buffer.seek(0)
    with pytest.raises(BundleCorrupt, match=r"extra\.py is not listed"):
        unpack(buffer, tmp_path / "out")
