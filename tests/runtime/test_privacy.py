"""What runs here stays here: onnxruntime's telemetry is off before it can begin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

# onnxruntime sends nothing either where it takes the process for a test's or a build server's.
LETS_IT_SEND = ("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
BUILD_SERVERS = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "JENKINS_URL", "GITLAB_CI", "BUILD_ID")

OPEN = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1])"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    value = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")
    }
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "secret-name", [value["x"]], [value["y"]])
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(
        helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), path
    )
    return path


def written(program: str, model: Path, home: Path, **environment: str) -> list[str]:
    """Run a program; return the files that it has left where users' files lie."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*LETS_IT_SEND, *BUILD_SERVERS)
    }
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, "-c", program, str(model)],
        env={**kept, **places, **environment},
        check=True,
        timeout=120,
    )
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "first",
    ["pollard.runtime", "pollard.runtime.sessions", "pollard.compress", "pollard.compress.latency"],
)
def test_a_session_leaves_no_trace(first: str, model: Path, tmp_path: Path) -> None:
    assert written(f"import {first}\n{OPEN}", model, tmp_path) == []


def test_an_empty_setting_is_no_consent(model: Path, tmp_path: Path) -> None:
    program = f"import pollard.runtime\n{OPEN}"
    assert written(program, model, tmp_path, ORT_DISABLE_TELEMETRY="") == []


def test_who_wants_the_telemetry_can_have_it(model: Path, tmp_path: Path) -> None:
    """And so the tests above can fail."""
    program = f"import pollard.runtime\n{OPEN}"
    found = written(program, model, tmp_path, ORT_DISABLE_TELEMETRY="0")
    if not found:
        pytest.skip("this build of onnxruntime writes no telemetry")
    assert any("onnxruntime" in name for name in found)
