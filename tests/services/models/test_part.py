"""An upload on disk: whatever is left of it after a crash, it goes on to the same files."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import threading
from pathlib import Path

import pytest

from pollard.services.common.errors import InvalidRequest
from pollard.services.models.part import Part, committed_bytes, last_change, remove

FILES = {
    "manifest.json": b"{}" * 3000,
    "cpu-fp32/model.onnx": random.Random(1).randbytes(40_000),
    "cpu-fp32/empty": b"",
    "labels.txt": b"a\nb\n",
    "z/last": random.Random(2).randbytes(1024),
}
DIGESTS = {path: hashlib.sha256(content).hexdigest() for path, content in FILES.items()}


@pytest.fixture(scope="module")
def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in FILES.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def part_at(directory: Path) -> Part:
    return Part(directory, max_files=100, max_total_bytes=1 << 30, hash_tar=True)


def is_whole(part: Part, tar: bytes) -> bool:
    stored = {path: (part.bundle / path).read_bytes() for path in FILES}
    return (
        part.ended
        and part.size == len(tar)
        and part.tar_sha256 == hashlib.sha256(tar).hexdigest()
        and part.digests == DIGESTS
        and stored == FILES
    )


def test_an_upload_that_breaks_anywhere_goes_on_from_there(tmp_path: Path, tar: bytes) -> None:
    chance = random.Random(4)
    for number in range(60):
        directory = tmp_path / str(number)
        done = 0
        while done < len(tar):
            part = part_at(directory)
            part.open()
            assert part.size == done
            for _ in range(chance.randrange(4)):
                count = chance.choice((1, 511, 512, 513, 7000, 30_000))
                part.append([tar[done : done + count // 2], tar[done + count // 2 : done + count]])
                done = min(done + count, len(tar))
            # What a kill leaves is what was written: nothing is kept back in memory.
            assert committed_bytes(directory) == done
            part.close()
        part = part_at(directory)
        part.open()
        assert is_whole(part, tar)
        part.close()


def test_what_a_power_cut_leaves_is_used_as_far_as_it_is_whole(tmp_path: Path, tar: bytes) -> None:
    """Files may have lost their ends, each for itself; nothing of that is taken for committed."""
    chance = random.Random(6)
    for number in range(60):
        directory = tmp_path / str(number)
        part = part_at(directory)
        part.open()
        part.append([tar[: chance.randrange(1, len(tar) + 1)]])
        part.close()
        written = [path for path in directory.rglob("*") if path.is_file()]
        for path in chance.sample(written, chance.randrange(1, len(written) + 1)):
            with path.open("r+b") as file:
                file.truncate(chance.randrange(path.stat().st_size + 1))
        part = part_at(directory)
        part.open()
        assert part.size <= len(tar)
        assert committed_bytes(directory) == part.size
        part.append([tar[part.size :]])
        assert is_whole(part, tar)
        part.close()


def test_a_file_below_a_file_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
        archive.addfile(tarfile.TarInfo("a/b"))
    part = part_at(tmp_path / "part")
    part.open()
    with pytest.raises(InvalidRequest, match="lies below a file"):
        part.append([buffer.getvalue()])
    part.close()


def test_a_part_tells_its_age_and_can_be_removed(tmp_path: Path, tar: bytes) -> None:
    directory = tmp_path / "part"
    part = part_at(directory)
    part.open()
    part.append([tar])
    part.sync()
    part.close()
    newest = max(path.stat().st_mtime for path in directory.rglob("*"))
    assert last_change(directory) == newest
    remove(directory)
    assert not directory.exists()
    remove(directory)
    with pytest.raises(FileNotFoundError):
        committed_bytes(directory)


def test_a_part_that_was_closed_opens_nothing_any_more(tmp_path: Path, tar: bytes) -> None:
    part = part_at(tmp_path / "part")
    part.close()
    part.open()
    assert not (tmp_path / "part").exists()
    with pytest.raises(OSError, match="closed"):
        part.append([tar])


def test_closing_waits_for_what_is_being_opened(
    tmp_path: Path, tar: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = part_at(tmp_path / "part")
    first.open()
    first.append([tar[:20_000]])
    first.close()
    part = part_at(tmp_path / "part")
    reading, go_on = threading.Event(), threading.Event()
    read = part._read_content

    def held() -> None:
        reading.set()
        assert go_on.wait(60)
        read()

    monkeypatch.setattr(part, "_read_content", held)
    opening, closing = threading.Thread(target=part.open), threading.Thread(target=part.close)
    opening.start()
    assert reading.wait(60)
    closing.start()
    go_on.set()
    opening.join(60)
    closing.join(60)
    # Whatever had been opened would be a warning that fails a test.
    assert (part._structure, part._file) == (None, None)
    assert committed_bytes(tmp_path / "part") == 20_000
