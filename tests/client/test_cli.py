"""The `pollard` command without any service: usage, exit codes, other distributions' commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.client.cli import _main
from pollard.models.v1 import model_service_pb2
from pollard.runtime.bundle import Bundle
from pollard.vision.v1 import vision_service_pb2

BundleMaker = Callable[..., Bundle]


class _Entry:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name = name
        self.load = load
        self.dist = type("Dist", (), {"name": name})()


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(*entries: _Entry) -> None:
        monkeypatch.setattr(metadata, "entry_points", lambda group: list(entries))

    install()
    return install


def test_version_and_help(capsys: pytest.CaptureFixture[str], plugins: Any) -> None:
    assert _main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"pollard {metadata.version('pollard-client')}\n"
    assert _main.run(["--help"]) == 0
    assert "models" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "summary"),
    [
        ([], "Show what the services do now: requests, latencies, queues, swaps and rollouts."),
        (["keys"], "Sign a bundle: write its file `signature`, in place of an older one."),
        (["serve"], "Start the preprocess and vision service: images in, answers out."),
        (
            ["store"],
            "Write the registry as it is at one moment, and every bundle, into a directory.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_summaries_of_commands_are_not_cut(
    group: list[str],
    summary: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert _main.run([*group, "--help"]) == 0
    told = capsys.readouterr().out
    assert "..." not in told.partition("Commands:")[2]
    assert max(map(len, told.splitlines())) <= 60
    assert summary in " ".join(told.split())


def test_every_command_is_listed_where_its_distribution_is_missing(
    capsys: pytest.CaptureFixture[str], plugins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _main.run(["--help"]) == 0
    alone = capsys.readouterr().out.partition("Commands:")[2]
    monkeypatch.undo()
    assert _main.run(["--help"]) == 0
    together = capsys.readouterr().out.partition("Commands:")[2]
    names = re.compile(r"^  (\w+)", re.M)
    assert set(names.findall(alone)) == set(names.findall(together))
    assert re.search(r"^  profile .*\(needs pollard-compression\)", alone, re.M)
    assert re.search(r"^  up .*\(needs pollard-services\)", alone, re.M)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pollard mod", ["models"]),
        ("pollard models ro", ["rollback", "rollout"]),
        ("pollard models rollout m --st", ["--steps"]),
        ("pollard serve inference --tls-c", ["--tls-certificate", "--tls-client-ca", "--tls-ca"]),
    ],
)
def test_a_shell_completes_commands_and_their_options(typed: str, offered: list[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "pollard.client.cli"],
        env={**os.environ, **words, "_POLLARD_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == offered, done.stderr


@pytest.mark.parametrize(
    ("command", "distribution"),
    [
        (["up", "--port-base", "3"], "pollard-services"),
        (["serve", "models"], "pollard-services"),
        (["compress", "zoo:x", "--out", "y"], "pollard-compression"),
        (["demo", "--help"], "pollard-compression"),
    ],
)
def test_a_command_that_is_not_installed_says_what_to_install(
    command: list[str], distribution: str, capsys: pytest.CaptureFixture[str], plugins: Any
) -> None:
    assert _main.run(command) == 1
    error = capsys.readouterr().err
    assert f"needs the distribution {distribution}, which is not installed" in error
    assert f"pip install '{distribution}" in error


def test_commands_of_other_distributions_are_added(
    capsys: pytest.CaptureFixture[str], plugins: Any
) -> None:
    def register(app: Any) -> None:
        @app.command("up")
        def up() -> None:
            print("up and running")

    plugins(_Entry("pollard-services", lambda: register))
    assert _main.run(["up"]) == 0
    assert capsys.readouterr().out == "up and running\n"


def test_a_broken_distribution_does_not_break_the_others(
    capsys: pytest.CaptureFixture[str], plugins: Any
) -> None:
    def load() -> Any:
        raise ImportError("No module named 'pydantic'")

    plugins(_Entry("pollard-services", load))
    assert _main.run(["--version"]) == 0
    assert _main.run(["up"]) == 1
    assert "pollard-services is broken: No module named 'pydantic'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["models", "push"],
        ["models", "push", "dir", "--model", "Not A Name"],
        ["models", "show", "m", "--revision", "0"],
        ["models", "show", "m", "--server", "nowhere"],
        ["models", "alias", "m", "production"],
        ["models", "alias", "m", "12", "1"],
        ["models", "delete", "m", "--revision", "1", "--force", "--yes"],
        ["predict", "--model", "m"],
        ["predict", "no-such-file.png", "--model", "m"],
    ],
)
def test_wrong_usage_is_exit_code_2_in_two_lines(
    arguments: list[str], capsys: pytest.CaptureFixture[str], plugins: Any
) -> None:
    assert _main.run(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 3


def test_no_server_is_exit_code_1_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], plugins: Any
) -> None:
    assert _main.run(["models", "list", "--server", "127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert "127.0.0.1:1 cannot be reached" in error
    assert "pollard up" in error


def test_a_directory_that_is_no_bundle_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], plugins: Any, address: str, scripted: Any, tmp_path: Path
) -> None:
    scripted.on("GetModel", lambda request, context: model_service_pb2.GetModelResponse())
    assert _main.run(["models", "push", str(tmp_path), "--model", "m", "--server", address]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err
    other = tmp_path / "model.pt"
    other.write_bytes(b"")
    assert _main.run(["models", "push", str(other), "--model", "m", "--server", address]) == 1
    assert "neither the directory of a bundle nor a .onnx file" in capsys.readouterr().err


def test_deleting_asks_first(
    capsys: pytest.CaptureFixture[str],
    plugins: Any,
    address: str,
    scripted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert _main.run(["models", "delete", "m", "--server", address]) != 0
    assert scripted.calls == []


def test_the_server_may_come_from_the_environment(
    capsys: pytest.CaptureFixture[str],
    plugins: Any,
    address: str,
    scripted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_service_pb2.Model(name="models/digits", latest_revision=2)
    model.labels["team"] = "a"
    scripted.on("ListModels", lambda r, c: model_service_pb2.ListModelsResponse(models=[model]))
    monkeypatch.setenv("POLLARD_MODELS_ADDRESS", address)
    assert _main.run(["models", "list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert _main.run(["models", "list", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["latest_revision"], found["labels"]) == (
        "digits",
        2,
        {"team": "a"},
    )


def test_one_bad_image_does_not_keep_the_others_from_being_answered(
    capsys: pytest.CaptureFixture[str],
    plugins: Any,
    address: str,
    scripted: Any,
    abort_with: Callable[..., None],
    tmp_path: Path,
) -> None:
    for name in ("good.png", "bad.png"):
        (tmp_path / name).write_bytes(name.encode())

    def predict(request: Any, context: grpc.ServicerContext) -> Any:
        response = vision_service_pb2.PredictBatchResponse()
        for image in request.images:
            result = response.results.add()
            if image.content == b"bad.png":
                result.error.code = grpc.StatusCode.INVALID_ARGUMENT.value[0]
                result.error.message = "not an image"
            else:
                result.response.model, result.response.revision = "m", 1
                result.response.classification.labels.add(index=3, label="[three]", score=0.75)
        return response

    scripted.on("PredictBatch", predict)
    files = [str(tmp_path / "bad.png"), str(tmp_path / "good.png")]
    assert _main.run(["predict", *files, "--model", "m", "--server", address]) == 1
    assert scripted.calls == ["PredictBatch"]
    captured = capsys.readouterr()
    assert "bad.png: not an image" in captured.err
    assert "[three]" in captured.out


def test_many_images_are_asked_about_in_batches_and_what_is_too_much_alone(
    capsys: pytest.CaptureFixture[str],
    plugins: Any,
    address: str,
    scripted: Any,
    abort_with: Callable[..., None],
    tmp_path: Path,
) -> None:
    files = []
    for index in range(20):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(str(index).encode())
    sizes = []

    def predict(request: Any, context: grpc.ServicerContext) -> Any:
        sizes.append(len(request.images))
        if any(image.content == b"17" for image in request.images):
            abort_with(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "message too large")
        response = vision_service_pb2.PredictBatchResponse()
        for image in request.images:
            answer = response.results.add().response
            answer.classification.labels.add(label=f"label {image.content.decode()}")
        return response

    scripted.on("PredictBatch", predict)
    arguments = ["predict", *map(str, files), "--model", "m", "--server", address, "--json"]
    assert _main.run(arguments) == 1
    assert sizes == [16, 4, 1, 1, 1, 1]
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == [str(file) for file in files]
    assert answers[17]["error"] == "message too large"
    del answers[17]
    told = [answer["labels"][0]["label"] for answer in answers]
    assert told == [f"label {index}" for index in range(20) if index != 17]


def test_an_unexpected_error_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], plugins: Any
) -> None:
    def register(app: Any) -> None:
        @app.command("up")
        def up() -> None:
            raise ZeroDivisionError("a bug")

    plugins(_Entry("pollard-services", lambda: register))
    with pytest.raises(ZeroDivisionError):
        _main.run(["up"])


def test_output_to_a_reader_that_has_gone_is_no_error() -> None:
    code = "from pollard.client.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate()
    assert b"Traceback" not in errors
