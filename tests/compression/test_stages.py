from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pollard.compress.errors import CacheUnusable, DiskFull
from pollard.compress.stages import Done, Stages, scratch


def text(stages: Stages, name: str, inputs: dict[str, Any], content: str) -> Done[str]:
    return stages.run(
        name,
        inputs,
        lambda folder: (folder / "text").write_text(content) and None,
        lambda folder: (folder / "text").read_text(),
    )


def test_a_finished_stage_is_taken_as_it_is_by_the_next_run(tmp_path: Path) -> None:
    first = text(Stages(tmp_path, {"data": "d"}), "cut", {"ratio": 0.5}, "one")
    again = text(Stages(tmp_path, {"data": "d"}), "cut", {"ratio": 0.5}, "other")
    assert (first.value, first.reused) == ("one", False)
    assert (again.value, again.reused, again.key) == ("one", True, first.key)
    assert again.seconds == first.seconds


@pytest.mark.parametrize(
    ("base", "name", "inputs"),
    [
        ({"data": "e"}, "cut", {"ratio": 0.5}),
        ({"data": "d"}, "join", {"ratio": 0.5}),
        ({"data": "d"}, "cut", {"ratio": 0.6}),
        ({"data": "d"}, "cut", {"ratio": 0.5, "seed": 1}),
    ],
)
def test_whatever_went_in_makes_another_stage(
    tmp_path: Path, base: dict[str, Any], name: str, inputs: dict[str, Any]
) -> None:
    text(Stages(tmp_path, {"data": "d"}), "cut", {"ratio": 0.5}, "one")
    assert text(Stages(tmp_path, base), name, inputs, "other").value == "other"


def test_fresh_stages_are_made_anew_and_kept(tmp_path: Path) -> None:
    text(Stages(tmp_path), "cut", {}, "one")
    assert text(Stages(tmp_path, fresh=True), "cut", {}, "other").value == "other"
    assert text(Stages(tmp_path), "cut", {}, "third").value == "other"


def test_a_damaged_or_forgotten_stage_is_made_anew(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    done = text(stages, "cut", {}, "one")
    (done.folder / "text").write_text("two")
    assert text(stages, "cut", {}, "three").value == "three"
    stages.forget(done)
    assert text(stages, "cut", {}, "four").value == "four"


def test_a_full_disk_keeps_what_was_finished_and_what_one_can_go_on_from(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    text(stages, "cut", {}, "one")

    def full(folder: Path) -> None:
        (scratch(folder) / "step").write_text("7")
        (folder / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match=r"no space for the stage recover: .*--cache"):
        stages.run("recover", {}, full, lambda folder: None)
    (half,) = tmp_path.glob("recover-*.partial")
    assert [path.name for path in half.iterdir()] == ["scratch"]

    def on(folder: Path) -> None:
        step = (scratch(folder) / "step").read_text()
        (folder / "text").write_text(f"from {step}")

    done = stages.run("recover", {}, on, lambda folder: (folder / "text").read_text())
    assert done.value == "from 7"
    assert sorted(path.name for path in done.folder.iterdir()) == ["stage.json", "text"]
    assert text(Stages(tmp_path), "cut", {}, "two").reused


def test_a_file_beyond_the_limit_of_the_process_is_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from pollard.compress.errors import DiskFull\n"
        "from pollard.compress.stages import Stages\n"
        "stages = Stages(Path(sys.argv[1]))\n"
        "stages.run('cut', {}, lambda f: None, lambda f: None)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    stages.run('export', {}, lambda f: (f / 'x').write_bytes(bytes(10**6)), print)\n"
        "except DiskFull as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "there is no space for the stage export" in done.stdout
    assert len(list(tmp_path.glob("cut-*/stage.json"))) == 1
    assert not list(tmp_path.glob("export-*/x"))


def test_two_runs_make_one_stage_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pollard.compress.stages import Stages\n"
        "def make(folder):\n"
        "    print('making', flush=True)\n    time.sleep(float(sys.argv[2]))\n"
        "done = Stages(Path(sys.argv[1])).run('cut', {}, make, lambda folder: None)\n"
        "print('reused' if done.reused else 'made', flush=True)\n"
    )

    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    first = start(600)
    assert first.stdout is not None
    assert first.stdout.readline() == "making\n"
    second = start(0)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1)  # it waits for the first, and goes on when that is killed
    first.send_signal(signal.SIGKILL)
    assert second.communicate(timeout=60)[0] == "making\nmade\n"
    first.communicate()
    assert text(Stages(tmp_path), "other", {}, "x").value == "x"


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    made = [text(Stages(tmp_path), "cut", {"n": n}, "x" * 1000) for n in range(3)]
    for age, done in enumerate(made):
        os.utime(done.folder / "stage.json", (1000.0 * age, 1000.0 * age))
    stages = Stages(tmp_path)
    text(stages, "cut", {"n": 0}, "")
    stages.trim(stages.size_bytes - 1)
    assert [done.folder.exists() for done in made] == [True, False, True]
    stages.trim(0)  # what the run itself uses stays
    assert [done.folder.exists() for done in made] == [True, False, False]


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusable, match="--cache"):
        Stages(tmp_path / "file" / "stages")
