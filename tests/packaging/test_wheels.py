"""The five wheels are built and installed together in a clean environment.

Services, runtime, client and contracts are installed with all that they ask
for, as a user would; the compression wheel goes in beside them without its
dependencies, because torch alone is larger than all the rest: its own code then
finds torch in the environment of the tests.
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("protos/python", "runtime", "clients/python", "services", "compression")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each distribution, by its folder."""
    built = {}
    for folder in FOLDERS:
        out = tmp_path_factory.mktemp("wheel")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "build",
                "--wheel",
                "--no-isolation",
                "--outdir",
                str(out),
                str(REPOSITORY / folder),
            ],
            check=True,
            capture_output=True,
        )
        (built[folder],) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the five wheels; the path of its Python."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=True)
    python = root / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = ["--constraint", str(REPOSITORY / "constraints.txt")]
    services = [str(wheels[folder]) for folder in FOLDERS[:3]]
    subprocess.run([*pip, *constraints, *services, f"{wheels['services']}[cpu]"], check=True)
    subprocess.run([*pip, "--no-deps", str(wheels["compression"])], check=True)
    return python


def run(python: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout


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
            [str(command), *arguments], capture_output=True, text=True, check=False, cwd="/"
        )
        assert done.returncode == 0, done.stderr
    version = (REPOSITORY / "VERSION").read_text().strip()
    done = subprocess.run(
        [str(command), "--version"], capture_output=True, text=True, check=True, cwd="/"
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
    )
    assert done.returncode != 0
    assert "torch" in done.stderr
    assert "Traceback" not in done.stderr
