"""The five wheels are built and installed together in a clean environment.

Services, runtime, client and contracts are installed with all that they ask
for, as a user would; the compression wheel goes in beside them without its
dependencies, because torch alone is larger than all the rest: its own code then
finds torch in the environment of the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("protos/python", "runtime", "clients/python", "services", "compression")

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


def build(source: Path, out: Path) -> Path:
    """Build the wheel of a distribution."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution, by its folder."""
    return {
        folder: build(REPOSITORY / folder, tmp_path_factory.mktemp("wheel")) for folder in FOLDERS
    }


CLIENT_ALONE = """
import sys
import pollard.client
assert not {"onnxruntime", "torch", "PIL", "pollard.runtime", "pollard.services"} & set(sys.modules)
with pollard.client.VisionClient("127.0.0.1:1", retry=pollard.client.RetryPolicy.none()) as vision:
    try:
        vision.predict(b"image", "model")
    except pollard.client.Unavailable as error:
        print(error.code.name)
"""


class Installed:
    """An environment with the five wheels, and what was seen when only the client was there."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self.alone = ""
        self.alone_command: subprocess.CompletedProcess[str] | None = None


@pytest.fixture(scope="module")
def installed(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A new environment, with the client at first and then with everything."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=True)
    made = Installed(root / "bin" / "python")
    pip = [str(made.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = ["--constraint", str(REPOSITORY / "constraints.txt")]
    # pip would take pollard-protos, of the same version, from an index.
    client = [str(wheels["protos/python"]), str(wheels["clients/python"])]
    subprocess.run([*pip, *constraints, *client], check=True)
    made.alone = run(made.python, "-c", CLIENT_ALONE)
    made.alone_command = subprocess.run(
        [str(root / "bin" / "pollard"), "up"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=BARE,
    )
    rest = [str(wheels["runtime"]), f"{wheels['services']}[cpu]"]
    subprocess.run([*pip, *constraints, *client, *rest], check=True)
    subprocess.run([*pip, "--no-deps", str(wheels["compression"])], check=True)
    return made


@pytest.fixture(scope="module")
def environment(installed: Installed) -> Path:
    """The Python of an environment with the five wheels."""
    return installed.python


# Nothing of the repository's own sources may stand in for what was installed.
BARE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(python: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, check=True, cwd="/", env=BARE
    )
    return done.stdout


def test_the_client_alone_works_and_says_what_else_there_is(installed: Installed) -> None:
    assert installed.alone == "UNAVAILABLE\n"
    done = installed.alone_command
    assert done is not None
    assert done.returncode == 1
    assert "pip install 'pollard-services[cpu]'" in done.stderr


def test_wheels_are_the_same_bytes_wherever_and_whenever_they_are_built(
    wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("elsewhere") / "with another name"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*FOLDERS, "VERSION", "LICENSE"):
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignored, copy_function=shutil.copyfile)
        elif source.exists():
            copy.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy / name)
    for number, folder in enumerate(FOLDERS):
        again = build(copy / folder, copy / f"wheels{number}")
        assert again.name == wheels[folder].name
        assert again.read_bytes() == wheels[folder].read_bytes(), again.name


def test_no_two_wheels_hold_the_same_file(wheels):
    owners: dict[str, str] = {}
    for folder, wheel in wheels.items():
        for name in zipfile.ZipFile(wheel).namelist():
            assert owners.setdefault(name, folder) == folder, name
    assert "pollard/__init__.py" not in owners


def test_every_package_says_that_it_is_typed(wheels):
    for folder, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        packages = {name.split("/")[1] for name in names if name.startswith("pollard/")}
        for package in packages:
            assert f"pollard/{package}/py.typed" in names, (folder, package)


def test_everything_is_found_in_a_clean_environment(environment):
    out = run(
        environment,
        "-c",
        "import pollard.client, pollard.runtime.sessions, pollard.services.models.main, "
        "pollard.services.inference.main, pollard.services.preprocess.main, sys; "
        "assert 'torch' not in sys.modules; print(pollard.client.__file__)",
    )
    assert str(environment.parent.parent) in out


def test_the_command_starts_in_a_clean_environment(environment):
    command = environment.parent / "pollard"
    for arguments in (
        ["--help"],
        ["serve", "--help"],
        ["models", "--help"],
        ["compress", "--help"],
    ):
        done = subprocess.run(
            [str(command), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=BARE,
        )
        assert done.returncode == 0, done.stderr
    version = (REPOSITORY / "VERSION").read_text().strip()
    done = subprocess.run(
        [str(command), "--version"], capture_output=True, text=True, check=True, cwd="/", env=BARE
    )
    assert version in done.stdout


def test_migrations_and_other_data_travel_in_the_wheels(wheels):
    names = zipfile.ZipFile(wheels["services"]).namelist()
    assert any("/versions/" in name and name.endswith(".py") for name in names)


def test_compression_without_torch_says_what_to_install(environment, tmp_path):
    command = [str(environment.parent / "pollard"), "train", "small-cnn-28", "--data", "digits"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "weights.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=BARE,
    )
    assert done.returncode != 0
    assert "torch" in done.stderr
    assert "Traceback" not in done.stderr
