"""What the drills refuse, in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from pollard.services.drill.cli import app


@pytest.fixture
def invoke() -> Callable[..., Result]:
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, ["swap", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "0%"], "neither 1% to 100%"),
        (["--load", "much"], "neither 1% to 100%"),
        (["--max-time", "soon"], "no duration"),
        (["flowers"], "MODEL is a model of a running installation"),
        (["--revisions", "1,2"], "--revisions belongs to a MODEL"),
        (["flowers", "--manager", "127.0.0.1:1", "--revisions", "2,2"], "not two revisions"),
        (["--manager", "127.0.0.1:1", "--kills", "3"], "is not killed"),
        (["--manager", "127.0.0.1:1", "--kill", "random"], "is not killed"),
        (["--manager", "http"], "must be HOST:PORT"),
        (["--steps", "upload,lunch"], "'lunch' is no step"),
        (["--kill", "postman"], "postman"),
    ],
)
def test_usage_errors_end_with_code_2(
    invoke: Callable[..., Result], arguments: list[str], message: str
) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_an_installation_that_is_not_there_is_told(invoke: Callable[..., Result]) -> None:
    done = invoke("--manager", "127.0.0.1:9", "--vision", "127.0.0.1:9")
    assert done.exit_code == 1
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "closed"], "even rate"),
        (["--for", "ever"], "no duration"),
        (["--only", "kill,lunch"], "'lunch' is no fault; there are kill, reset,"),
        (["--only", ""], "'' is no fault"),
    ],
)
def test_usage_errors_of_chaos_end_with_code_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["chaos", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "closed"], "even rate"),
        (["--for", "ever"], "no duration"),
        (["--swap-every", "often"], "no duration"),
    ],
)
def test_usage_errors_of_a_soak_end_with_code_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["soak", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
