"""Every language's client gives the same answers and the same errors, as the vectors say.

The vectors are data (`vectors/*.json`, described in `README.md`): a new one needs no code. Each
language's contract runner makes all the calls in one process.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

VECTORS = Path(__file__).parent / "vectors"
LANGUAGES = ("python", "python-asyncio", "typescript", "go", "cpp", "java")
REQUIRED = "POLLARD_REQUIRE_CLIENTS"
"""Languages, with commas, whose toolchain must be there: what else would be skipped fails."""

# The first build of all that a client stands on takes minutes.
pytestmark = pytest.mark.timeout(1200)


def marks_of(language: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a language's tests: another one's runner is built first."""
    return [] if language.startswith("python") else [pytest.mark.long]


EACH = [pytest.param(language, marks=marks_of(language)) for language in LANGUAGES]


def read_vectors() -> dict[str, dict[str, Any]]:
    """Return every case by name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(VECTORS.glob("*.json")):
        for case in json.loads(path.read_text())["cases"]:
            name = f"{path.stem}: {case['name']}"
            assert name not in found, f"two cases are called {name!r}"
            found[name] = case
    return found


CASES = read_vectors()
PAIRS = [
    pytest.param(
        language,
        name,
        id=f"{language}-{name}",
        marks=marks_of(language),
    )
    for language in LANGUAGES
    for name, case in CASES.items()
    if language.partition("-")[0] in case.get("languages", [language.partition("-")[0]])
]


def throughs(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what stands for each front of a case; the client is given all of their addresses."""
    through = case.get("through", [])
    return through if isinstance(through, list) else [through]


class Run:
    """What one language's runner printed, and what the fronts saw meanwhile."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[str, Any]] = {}
        self.attempts: dict[str, list[dict[str, int]]] = {}
        """By method, of each front."""
        self.left_open: list[str] = []
        self.exit_code = 0
        self.errors = ""


@pytest.fixture(scope="module")
def run_of(
    live: Any,
    fronts: Callable[[dict[str, Any], str], Any],
    builds: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Run]:
    """A function that gives the run of a language; each is run once."""
    directory = tmp_path_factory.mktemp("plans")
    before = {
        name: [fronts(spec, case["server"]) for spec in specs]
        for name, case in CASES.items()
        if (specs := throughs(case))
    }
    done: dict[str, Run | str] = {}

    def plan(language: str) -> Path:
        cases = []
        for number, (name, case) in enumerate(CASES.items()):
            if language.partition("-")[0] not in case.get(
                "languages", [language.partition("-")[0]]
            ):
                continue
            client = dict(case.get("client", {}))
            if name in before:
                address = ",".join(f"127.0.0.1:{front.port}" for front in before[name])
                if "tls" in throughs(case)[0]:
                    client.setdefault("ca_file", str(before[name][0].ca_file))
            elif case["server"] == "nowhere":
                address = case.get("address", "127.0.0.1:1")
            else:
                address = live.address(case["server"])
            arguments = {
                key: value.replace("{language}", language) if isinstance(value, str) else value
                for key, value in case["arguments"].items()
            }
            if "image_base64" in arguments:
                image = directory / f"image{number}"
                image.write_bytes(base64.b64decode(arguments.pop("image_base64")))
                arguments["image_path"] = str(image)
            if case["call"] == "push":
                arguments["bundle"] = str(live.bundle)
            made = {
                "case": name,
                "address": address,
                "call": case["call"],
                "client": client,
                "arguments": arguments,
            }
            made |= {key: case[key] for key in ("requests", "cancel_after_seconds") if key in case}
            cases.append(made)
        path = directory / f"{language}.json"
        path.write_text(json.dumps({"cases": cases}))
        return path

    def run(language: str) -> Run | str:
        made = builds.LANGUAGES[language]
        if words := made.missing():
            return str(words)
        made.build()
        for front in itertools.chain(*before.values()):
            front.reset()
        with subprocess.Popen(
            [*made.runner(), str(plan(language))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **made.environment()},
            stdin=subprocess.DEVNULL,
        ) as runner:
            try:
                printed, errors = runner.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                # The cases before the one that hangs are judged all the same.
                runner.kill()
                printed, errors = runner.communicate()
                errors += "\nthe runner had not ended after 120 s"
        result = Run()
        result.exit_code, result.errors = runner.returncode, errors
        for line in printed.splitlines():
            read = json.loads(line)
            result.lines[read.pop("case")] = read
        for name, through in before.items():
            if not all(front.wait_quiet() for front in through):
                result.left_open.append(name)
            result.attempts[name] = [dict(front.attempts) for front in through]
        return result

    def cached(language: str) -> Run:
        if language not in done:
            done[language] = run(language)
        result = done[language]
        if isinstance(result, str):
            if language in os.environ.get(REQUIRED, "").split(","):
                pytest.fail(f"{REQUIRED} names {language}, but {result}", pytrace=False)
            pytest.skip(result)
        return result

    return cached


def agree(expected: Any, actual: Any, where: str) -> None:
    """Compare: objects may hold more than expected, numbers may be a little off.

    `{"contains": […]}` stands for a list that holds at least these, in any order, and
    `{"at_least": n}` for a number.
    """
    if isinstance(expected, dict) and set(expected) == {"contains"}:
        for value in expected["contains"]:
            assert any(agrees(value, each) for each in actual), f"{where}: {actual}"
    elif isinstance(expected, dict) and set(expected) == {"at_least"}:
        assert actual >= expected["at_least"], where
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), where
        for key, value in expected.items():
            if key == "message_contains":
                assert value.lower() in actual["message"].lower(), f"{where}.message"
            else:
                assert key in actual, f"{where}.{key} is missing in {actual}"
                agree(value, actual[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list), where
        assert len(actual) == len(expected), f"{where}: {actual}"
        for index, value in enumerate(expected):
            agree(value, actual[index], f"{where}[{index}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5), where
    else:
        assert actual == expected, where


def agrees(expected: Any, actual: Any) -> bool:
    try:
        agree(expected, actual, "")
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(("language", "name"), PAIRS)
def test_a_client_agrees_with_the_vector(
    run_of: Callable[[str], Run], language: str, name: str
) -> None:
    run = run_of(language)
    assert name in run.lines, f"the runner printed nothing for it\n{run.errors[-4000:]}"
    expected = CASES[name]["expect"]
    kind = next(kind for kind in ("answer", "error", "refused") if kind in expected)
    assert kind in run.lines[name], run.lines[name]
    agree(expected[kind], run.lines[name][kind], kind)
    if "attempts" in expected:
        attempts = expected["attempts"]
        seen = run.attempts[name]
        agree(attempts, seen if isinstance(attempts, list) else seen[0], "attempts")
    assert name not in run.left_open, "a call was left open at the server"


@pytest.mark.parametrize("language", EACH)
def test_a_runner_ends_by_itself_and_says_nothing_else(
    run_of: Callable[[str], Run], language: str
) -> None:
    # No runner calls exit(): a client that leaves a thread or a socket behind would keep it alive.
    run = run_of(language)
    assert run.exit_code == 0, run.errors[-4000:]
    # grpc's own thread may still speak to asyncio's loop when that has been closed, and says so.
    assert run.errors == "" or language == "python-asyncio"


@pytest.mark.parametrize("language", EACH)
def test_the_example_program_answers(
    run_of: Callable[[str], Run], builds: ModuleType, live: Any, tmp_path: Path, language: str
) -> None:
    run_of(language)
    example = builds.LANGUAGES[language]
    image = tmp_path / "seven.png"
    known = CASES["predict: an image file is answered by the production revision"]["arguments"]
    image.write_bytes(base64.b64decode(known["image_base64"]))

    def classify(*arguments: str) -> subprocess.CompletedProcess[str]:
        address = {"POLLARD_VISION_ADDRESS": live.address("preprocess")}
        return subprocess.run(
            [*example.example(), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **example.environment(), **address},
            timeout=60,
            check=False,
        )

    answered = classify("digits", str(image))
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.startswith(f"{image}: two 6")
    assert answered.stdout.endswith("(revision 1)\n")
    refused = classify("nothing", str(image))
    assert refused.returncode == 1
    assert refused.stderr.startswith("push a model first: ")
    for few in ((), ("digits",)):
        refused = classify(*few)
        assert refused.returncode == 2
        assert refused.stderr.startswith("usage: ")


def test_every_vector_is_for_a_language_that_exists() -> None:
    known = {language.partition("-")[0] for language in LANGUAGES}
    for name, case in CASES.items():
        assert known & set(case.get("languages", known)), name
