"""What each distribution may load, proven in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

CLIENT = ["pollard.client", "pollard.client.cli"]
SERVICES = [
    "pollard.services.cli",
    "pollard.services.inference.main",
    "pollard.services.preprocess.main",
    "pollard.services.models.main",
]


def loaded_after(module: str) -> set[str]:
    """Top-level modules that are loaded after importing ``module``."""
    code = (
        f"import {module}, sys, json; "
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", CLIENT)
def test_the_client_loads_neither_onnxruntime_nor_torch_nor_a_database(module):
    heavy = {"onnxruntime", "onnx", "torch", "sqlalchemy", "sklearn", "scipy", "plotly"}
    heavy |= {"model_signing", "sigstore", "cryptography"}
    assert not loaded_after(module) & heavy


@pytest.mark.parametrize("module", SERVICES)
def test_the_services_load_no_torch(module):
    assert not loaded_after(module) & {"torch", "torch_pruning", "torchvision", "sklearn"}


def test_the_command_s_plug_ins_are_light():
    assert not loaded_after("pollard.compress.cli") & {"torch", "onnxruntime", "onnx", "sklearn"}
    assert not loaded_after("pollard.services.cli") & {"onnxruntime", "sqlalchemy"}


def test_the_runtime_loads_neither_grpc_nor_torch():
    for module in (
        "bundle",
        "archive",
        "machine",
        "sessions",
        "signing",
        "transforms",
        "postprocess",
    ):
        loaded = loaded_after(f"pollard.runtime.{module}")
        assert not loaded & {"grpc", "torch", "model_signing", "cryptography"}


def test_the_namespace_has_no_init():
    found = [
        path.relative_to(REPOSITORY).as_posix()
        for path in REPOSITORY.glob("**/src/pollard/__init__.py")
        if ".venv" not in path.parts
    ]
    assert found == []


def test_contracts_and_the_runtime_do_not_know_about_services_or_compression():
    for root in ("protos/python/src", "runtime/src", "clients/python/src"):
        for path in (REPOSITORY / root).rglob("*.py"):
            text = path.read_text()
            assert "pollard.services" not in text.replace('"pollard.services', ""), path
            assert "import pollard.compress" not in text, path
            assert "from pollard.compress" not in text, path
    for path in (REPOSITORY / "services/src").rglob("*.py"):
        assert "pollard.compress" not in path.read_text(), path
    for path in (REPOSITORY / "compression/src").rglob("*.py"):
        assert "pollard.services" not in path.read_text(), path


def test_domain_code_of_the_services_never_imports_grpc():
    services = REPOSITORY / "services/src/pollard/services"
    domain = [
        services / "common/errors.py",
        services / "common/routing.py",
        services / "inference/engine.py",
        services / "models/registry.py",
        services / "models/blobs.py",
        services / "models/switch.py",
    ]
    for path in domain:
        if path.exists():
            assert "import grpc" not in path.read_text(), path
