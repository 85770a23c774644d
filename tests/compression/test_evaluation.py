from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from rich.console import Console
from sklearn.metrics import classification_report
from typer.testing import CliRunner, Result

from pollard.compress import evaluation
from pollard.compress.answers import Answers, answer
from pollard.compress.cli import register
from pollard.compress.data import load_data
from pollard.compress.errors import LabelsMismatch, UsageInvalid
from pollard.compress.evaluation_page import render, rich_table
from pollard.compress.export import attach_pixels, export_core, serialize
from pollard.compress.models import load_model
from pollard.compress.zoo import find

Tree = Callable[..., Path]
SPEC = find("small-cnn-28").spec


@pytest.fixture(scope="module")
def files(digits_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trained network with uint8 and with float input, as plain files."""
    folder = tmp_path_factory.mktemp("files")
    core = export_core(load_model("small-cnn-28", digits_parent).module, SPEC)
    (folder / "float.onnx").write_bytes(serialize(core))
    (folder / "pixels.onnx").write_bytes(serialize(attach_pixels(core, SPEC)))
    return folder / "pixels.onnx", folder / "float.onnx"


def invoke(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_way_to_run_a_model_gives_the_same_figures(
    digits_parent: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    module = answer("small-cnn-28", "digits", weights=str(digits_parent))
    pixels = answer(str(files[0]), "digits")
    floats = answer(str(files[1]), "digits", spec=SPEC)
    np.testing.assert_allclose(pixels.scores, module.scores, atol=1e-5)
    np.testing.assert_allclose(floats.scores, module.scores, atol=1e-5)
    held_out = load_data("digits", SPEC).held_out
    assert (module.labels == held_out.labels).all()

    found = evaluation.judge(module, pixels).to_json()
    assert found["compared"]["same_answer"]["value"] == 1
    assert found["accuracy"] == evaluation.judge(floats).to_json()["accuracy"]
    report = classification_report(
        module.labels, module.scores.argmax(1), output_dict=True, zero_division=0
    )
    for ours, theirs in (("macro", "macro avg"), ("weighted", "weighted avg")):
        for name, their_name in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score")):
            assert found[ours][name] == pytest.approx(report[theirs][their_name], abs=1e-12)


def test_the_command_says_and_draws_it(
    digits_parent: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    done = invoke(
        "eval", "zoo:small-cnn-28", "--data", "digits", "--weights", digits_parent,
        "--against", files[0], "--plot", tmp_path / "made" / "e.html",
        "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("macro mean", "weighted mean", "Calibration error", "same answer to 100.00%"):
        assert words in done.output
    figures = json.loads((tmp_path / "e.json").read_text())
    assert np.sum(figures["confusion"]) == figures["accuracy"]["samples"] == 445
    assert figures["top5"]["value"] >= figures["accuracy"]["value"]
    page = (tmp_path / "made" / "e.html").read_text()
    assert "as sure as right" in page


def test_names_of_classes_are_no_markup() -> None:
    names = ["[red]", "[/b]"]
    scores = np.array([[0.9, 0.1], [0.8, 0.2]])
    found = evaluation.judge(Answers("m", scores, np.array([0, 1], np.int64), names, "d/all", []))
    console = Console(file=io.StringIO(), width=100)
    console.print(rich_table(found))
    written = console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO
    assert all(name in written for name in names)
    page = render(found)
    assert "The most frequent mistakes" in page
    assert "<td>[/b]</td><td>[red]</td><td>1</td>" in page


def test_parts_are_those_of_training(digits_parent: Path) -> None:
    data = load_data("digits", SPEC)
    for part, expected in (("choose", data.choose), ("train", data.train)):
        found = answer("small-cnn-28", "digits", weights=str(digits_parent), part=part)
        assert (found.labels == expected.labels).all()
    everything = answer("small-cnn-28", "digits", weights=str(digits_parent), part="all")
    assert len(everything.labels) == 1797


@pytest.mark.parametrize("size", [1, 3])
def test_a_file_for_a_fixed_number_of_images_is_asked_so_many_at_a_time(
    files: tuple[Path, Path], tmp_path: Path, size: int
) -> None:
    model = onnx.load(files[1])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(model, tmp_path / "fixed.onnx")
    fixed = answer(str(tmp_path / "fixed.onnx"), "digits", spec=SPEC)
    free = answer(str(files[1]), "digits", spec=SPEC)
    np.testing.assert_allclose(fixed.scores, free.scores, atol=1e-5)


def test_a_file_of_weights_is_no_model(digits_parent: Path) -> None:
    with pytest.raises(UsageInvalid, match="zoo:NAME"):
        answer(str(digits_parent), "digits")


def test_a_float_file_needs_its_normalisation(files: tuple[Path, Path]) -> None:
    with pytest.raises(UsageInvalid, match="--input-size"):
        answer(str(files[1]), "digits")


def test_the_classes_must_be_those_of_the_data(
    files: tuple[Path, Path], write_images: Tree
) -> None:
    with pytest.raises(LabelsMismatch, match="3 classes"):
        answer(str(files[0]), write_images())


def test_a_server_that_is_not_there_is_named() -> None:
    done = invoke("eval", "digits", "--data", "digits", "--server", "127.0.0.1:1")
    assert done.exit_code == 1
    assert "127.0.0.1:1" in done.output


def test_an_address_that_is_none_is_wrong_usage() -> None:
    done = invoke("eval", "digits", "--data", "digits", "--server", "nonsense")
    assert done.exit_code == 2
    assert "must be HOST:PORT" in done.output
