from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from pollard.compress import recipe_file
from pollard.compress.cli import register
from pollard.compress.errors import UsageInvalid
from pollard.compress.recipe import Recipe
from pollard.compress.zoo import find


def run(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["compress", *(str(argument) for argument in arguments)])


def write(path: Path, **fields: object) -> Path:
    path.write_text(json.dumps({"schema_version": 1, **fields}))
    return path


@pytest.mark.parametrize("name", ["small-fcos", "resnet50", "small-cnn-28"])
def test_what_a_manifest_holds_is_a_recipe_too(name: str, tmp_path: Path) -> None:
    recipe = Recipe(f"zoo:{name}", "shapes", "w.safetensors", spec=find(name).spec)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.public()))
    fields = recipe_file.read(path)
    assert recipe_file.make_spec(fields["spec"]) == find(name).spec
    path.write_text(json.dumps({**recipe.public(), "spec": {"letterbox": True}}))
    fields = recipe_file.read(path)
    with pytest.raises(UsageInvalid, match="needs height, width, channels"):
        recipe_file.make_spec(fields["spec"])


def test_a_commented_recipe_names_every_field_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    done = run("--init", path, "zoo:resnet20-cifar", "--prune", 0.3, "--keep-whole", "conv1")
    assert done.exit_code == 0, done.output
    fields = recipe_file.read(path)
    assert set(fields) == {field.name for field in dataclasses.fields(Recipe)}
    made = Recipe(**fields)
    assert made == Recipe(
        "zoo:resnet20-cifar", "digits", "parent.safetensors", prune=0.3, keep_whole=("conv1",)
    )
    assert path.read_text().count("\n# ") > len(fields)
    done = run("--init", path)
    assert done.exit_code == 2
    assert "exists" in done.output


def test_what_a_bundle_tells_of_its_recipe_is_a_recipe(tmp_path: Path) -> None:
    told = Recipe("small-cnn-28", "digits", "w.safetensors", prune=0.25).to_json()
    path = tmp_path / "recipe.json"
    path.write_text(told)
    assert Recipe(**recipe_file.read(path)).to_json() == told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema_version: 1\nprun: 0.5", "unknown key 'prun', did you mean 'prune'?"),
        ("schema_version: 1\nqqqqqqq: 0.5", "there are model, data"),
        ("schema_version: 1\nspec: {heigth: 3}", "did you mean 'height'"),
        ("schema_version: 2\nsparsity: 0.5", "install a newer Pollard"),
        ("prune: 0.5", "lacks schema_version"),
        ("schema_version: 1\nprune: much", "prune is 'much'; it must be a number"),
        ("schema_version: 1\nprune: true", "must be a number"),
        ("schema_version: 1\nepochs: 1.5", "must be a whole number or null"),
        ("schema_version: 1\nkeep_whole: conv1", "a list of names"),
        ("- a", "not a mapping"),
        ("a: [", "is not YAML"),
        ("schema_version: 1\nprune: 1.5", "at least 0 and below 1"),
    ],
)
def test_what_means_nothing_is_refused_with_words(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageInvalid) as caught:
        Recipe(**{"model": "m", "data": "d", "weights": "w", **recipe_file.read(path)})
    assert message in str(caught.value)


def test_exponents_are_numbers_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("schema_version: 1\nlearning_rate: 1e-3\n")
    assert recipe_file.read(path) == {"learning_rate": 0.001}


def test_flags_go_before_the_recipe(digits_parent: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "recipe.json", model="zoo:small-cnn-28", data="digits",
        weights=str(digits_parent), target="cpu-fp32", prune=0.5,
    )  # fmt: skip
    done = run("--recipe", path, "--prune", 0.7, "--dry-run")
    assert "70% of the MACs asked for" in done.output
    done = run("--recipe", path, "--out", tmp_path / "out", "--prune", 1.2)
    assert done.exit_code == 2
    assert "prune is 1.2" in done.output


def test_a_dry_run_tells_plan_goal_and_time_and_writes_nothing(
    digits_parent: Path, tmp_path: Path
) -> None:
    done = run(
        "small-cnn-28", "--data", "digits", "--weights", digits_parent, "--target", "cpu-fp32",
        "--prune", 0.7, "--dry-run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("images: ", "conv2: ", "stays whole", "can be met", "Time: about", "known only"):
        assert words in done.output
    assert list(tmp_path.iterdir()) == []
    done = run(
        "small-cnn-28", "--data", "digits", "--weights", digits_parent, "--prune", 0.9999,
        "--dry-run",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "at most" in done.output


def test_a_model_and_data_must_come_from_somewhere(tmp_path: Path) -> None:
    for arguments, words in (
        ([], "give MODEL"),
        (["small-cnn-28"], "give --data"),
        (["small-cnn-28", "--data", "digits"], "give --out"),
        (["--recipe", tmp_path / "no.yaml"], "cannot be read"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert words in done.output
