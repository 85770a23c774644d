"""Pictures of answers: painted in the right place, written where they are wanted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pollard.client import DetectedObject, Prediction, ScoredLabel
from pollard.client.cli import _main
from pollard.client.drawing import color_of, draw
from pollard.client.types import Timings
from pollard.vision.v1 import vision_service_pb2

GRAY = (90, 90, 90)


def photograph(width: int = 200, height: int = 100, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", (width, height), GRAY).save(file, "PNG", exif=exif)
    return file.getvalue()


def prediction(**fields: Any) -> Prediction:
    return Prediction("m", 1, fields.pop("labels", ()), None, Timings(0, 0, 0), **fields)


def box(index: int, x1: float, y1: float, x2: float, y2: float) -> DetectedObject:
    return DetectedObject(ScoredLabel(index, "", 0.9), x1, y1, x2, y2)


def test_a_box_is_painted_around_what_it_names() -> None:
    painted = draw(photograph(), prediction(objects=(box(3, 50, 40, 150, 90),), size=(200, 100)))
    pixels = np.asarray(painted)
    for x, y in ((50, 60), (149, 60), (100, 89)):
        assert tuple(pixels[y, x]) == color_of(3)
    assert tuple(pixels[65, 100]) == GRAY
    assert tuple(pixels[95, 10]) == GRAY


def test_a_mask_shines_through_and_leaves_out_what_was_not_seen() -> None:
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 1
    mask[80:] = 255
    painted = np.asarray(draw(photograph(), prediction(mask=mask, size=(200, 100))))
    mixed = (np.array(GRAY) + color_of(1)) / 2
    assert painted[50, 150] == pytest.approx(mixed, abs=2)
    assert tuple(painted[90, 150]) == GRAY


def test_a_background_is_not_painted_over() -> None:
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 1
    areas = (ScoredLabel(0, "background", 0.5), ScoredLabel(1, "cat", 0.5))
    painted = np.asarray(draw(photograph(), prediction(mask=mask, areas=areas, size=(200, 100))))
    assert tuple(painted[90, 90]) == GRAY
    assert tuple(painted[90, 150]) != GRAY


def test_a_small_picture_is_not_hidden_by_its_words() -> None:
    labels = tuple(ScoredLabel(index, "background", 0.2) for index in range(5))
    told = np.asarray(draw(photograph(120, 100), prediction(labels=labels)))
    assert (told == GRAY).all(axis=2).mean() > 0.5


def test_a_tiny_picture_is_enlarged_until_words_fit_beside_it() -> None:
    labels = tuple(ScoredLabel(index, "automobile", 0.2) for index in range(5))
    told = draw(photograph(32, 32), prediction(labels=labels))
    assert told.size == (224, 224)
    assert (np.asarray(told) == GRAY).all(axis=2).mean() > 0.5
    found = draw(photograph(40, 32), prediction(objects=(box(3, 10, 20, 30, 31),), size=(40, 32)))
    assert found.size == (280, 224)
    pixels = np.asarray(found)
    assert tuple(pixels[180, 71]) == tuple(pixels[180, 209]) == color_of(3)


def test_a_picture_that_is_only_narrow_is_not_enlarged_beyond_measure() -> None:
    assert draw(photograph(3000, 1), prediction()).size == (3000, 1)
    assert draw(photograph(700, 10), prediction()).size == (1400, 20)


def test_the_picture_is_upright() -> None:
    assert draw(photograph(orientation=6), prediction()).size == (100, 200)
    with pytest.raises(ValueError, match="200 × 100 pixels, this one has 100 × 200"):
        draw(photograph(orientation=6), prediction(objects=(), size=(200, 100)))


def test_a_classification_gets_a_caption() -> None:
    plain = np.asarray(draw(photograph(), prediction()))
    told = np.asarray(draw(photograph(), prediction(labels=(ScoredLabel(1, "cat", 0.7),))))
    assert (plain == GRAY).all()
    assert not (told == GRAY).all()


def test_boxes_at_the_edges_keep_their_names_in_the_picture() -> None:
    """Names longer than the picture, boxes of one pixel, boxes at the corners."""
    found = tuple(
        DetectedObject(ScoredLabel(index, "a very long name " * 4, 0.5), *corners)
        for index, corners in enumerate([(0, 0, 1, 1), (199, 99, 200, 100), (190, 0, 200, 100)])
    )
    assert draw(photograph(), prediction(objects=found, size=(200, 100))).size == (200, 100)


@pytest.fixture
def detects(scripted: Any) -> None:
    def predict(request: Any, context: Any) -> Any:
        response = vision_service_pb2.PredictBatchResponse()
        for _ in request.images:
            detection = response.results.add().response.detection
            detection.width, detection.height = 200, 100
            found = detection.objects.add(x1=10, y1=20, x2=90, y2=80)
            found.label.index, found.label.label, found.label.score = 2, "ship", 0.875
        return response

    scripted.on("PredictBatch", predict)


def ask(address: str, *arguments: object) -> int:
    words = [str(argument) for argument in arguments]
    return _main.run(["predict", *words, "--model", "m", "--server", address])


def test_the_command_tells_boxes_and_paints_them(
    detects: None, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sea.png").write_bytes(photograph())
    out = tmp_path / "new" / "out.png"
    assert ask(address, tmp_path / "sea.png", "--draw", out) == 0
    captured = capsys.readouterr()
    assert "ship" in captured.out
    assert "10,20 - 90,80" in captured.out
    assert f"drawn: {out}" in captured.err
    assert tuple(np.asarray(Image.open(out))[60, 10]) == color_of(2)


def test_several_images_are_painted_into_a_directory(
    detects: None, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name / "sea.png" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(photograph())
    assert ask(address, *files, "--draw", tmp_path / "out", "--json") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sea-2.png", "sea.png"]
    answers = json.loads(capsys.readouterr().out)
    assert answers[1]["drawn"] == str(tmp_path / "out" / "sea-2.png")
    assert answers[0]["objects"][0]["label"]["label"] == "ship"


@pytest.mark.parametrize(
    ("images", "target", "words"),
    [(1, "out.txt", "ends in .png"), (2, "out.png", "into a directory, not into a file")],
)
def test_a_place_that_cannot_be_is_refused_before_anything_is_asked(
    detects: None,
    scripted: Any,
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    images: int,
    target: str,
    words: str,
) -> None:
    files = [tmp_path / f"{index}.png" for index in range(images)]
    for file in files:
        file.write_bytes(photograph())
    assert ask(address, *files, "--draw", tmp_path / target) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert scripted.calls == []


def test_a_picture_that_cannot_be_written_costs_no_answer(
    detects: None, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sea.png").write_bytes(photograph())
    (tmp_path / "file").write_bytes(b"")
    assert ask(address, tmp_path / "sea.png", "--draw", tmp_path / "file" / "out.png") == 1
    captured = capsys.readouterr()
    assert "ship" in captured.out
    assert "could not be written" in captured.err


def test_the_command_tells_the_shares_of_a_mask(
    scripted: Any, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(request: Any, context: Any) -> Any:
        assert request.options.mask_encoding == vision_service_pb2.MASK_ENCODING_RUN_LENGTH
        response = vision_service_pb2.PredictBatchResponse()
        found = response.results.add().response.segmentation
        found.width, found.height = 200, 100
        found.run_lengths.classes.extend([1, 0])
        found.run_lengths.lengths.extend([5000, 15000])
        found.areas.add(index=0, label="sea", score=0.75)
        found.areas.add(index=1, label="sky", score=0.25)
        return response

    scripted.on("PredictBatch", predict)
    (tmp_path / "sea.png").write_bytes(photograph())
    assert ask(address, tmp_path / "sea.png") == 0
    assert "75.0%" in capsys.readouterr().out
    assert ask(address, tmp_path / "sea.png", "--json") == 0
    assert "mask" not in json.loads(capsys.readouterr().out)[0]


def test_runs_that_do_not_fill_the_image_are_no_answer(
    scripted: Any, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(request: Any, context: Any) -> Any:
        response = vision_service_pb2.PredictBatchResponse()
        found = response.results.add().response.segmentation
        found.width, found.height = 200, 100
        found.run_lengths.classes.extend([1])
        found.run_lengths.lengths.extend([7])
        return response

    scripted.on("PredictBatch", predict)
    (tmp_path / "sea.png").write_bytes(photograph())
    assert ask(address, tmp_path / "sea.png") == 1
    assert "do not fill an image of 200 × 100 pixels" in capsys.readouterr().err


def test_the_reasons_of_a_label_are_painted(
    scripted: Any, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = io.BytesIO()
    Image.new("RGB", (200, 100), (250, 200, 10)).save(overlay, "PNG")

    def predict(request: Any, context: Any) -> Any:
        response = vision_service_pb2.PredictBatchResponse()
        answer = response.results.add().response
        answer.revision = 7
        answer.classification.labels.add(index=3, label="cat", score=0.9)
        return response

    def explain(request: Any, context: Any) -> Any:
        assert (request.class_index, request.model.revision, request.overlay) == (3, 7, True)
        response = vision_service_pb2.ExplainResponse(height=1, width=2, values=[0, 1])
        response.overlay_png = overlay.getvalue()
        return response

    scripted.on("PredictBatch", predict)
    scripted.on("Explain", explain)
    (tmp_path / "cat.png").write_bytes(photograph())
    out = tmp_path / "out.png"
    assert ask(address, tmp_path / "cat.png", "--explain") == 2
    assert "give --draw, too" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert ask(address, tmp_path / "cat.png", "--explain", "--draw", out) == 0
    assert tuple(np.asarray(Image.open(out))[90, 150]) == (250, 200, 10)
