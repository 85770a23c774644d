"""What stays of a drill's directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pollard.services.drill.room import LOG_NAME, working_room


def test_nothing_stays_of_a_drill_that_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_room(tmp_path / "figures.json") as room:
        (room.directory / LOG_NAME).write_text("all is well\n")
        room.failed = False
    assert not room.directory.exists()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_the_log_of_a_drill_that_failed_lies_beside_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_room(tmp_path / "new" / "figures.json") as room:
        (room.directory / LOG_NAME).write_text("the reason\n")
    assert not room.directory.exists()
    kept = tmp_path / "new" / "figures.services.log"
    assert kept.read_text() == "the reason\n"
    assert str(kept) in capsys.readouterr().err


def test_without_figures_it_lies_among_the_temporary_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with working_room(None) as room:
        (room.directory / LOG_NAME).write_text("the reason\n")
        room.failed = True
    found = re.search(r"is kept in (\S+)", capsys.readouterr().err)
    assert found is not None
    kept = Path(found[1])
    try:
        assert kept.read_text() == "the reason\n"
    finally:
        kept.unlink()


def test_a_drill_whose_services_never_wrote_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_room(tmp_path / "figures.json") as room:
        pass
    assert not room.directory.exists()
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_kept_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no directory")
    with working_room(tmp_path / "file" / "figures.json") as room:
        (room.directory / LOG_NAME).write_text("the reason\n")
    assert not room.directory.exists()
    assert "could not be kept" in capsys.readouterr().err
