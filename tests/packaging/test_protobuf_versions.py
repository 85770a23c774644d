"""The contracts work with the protobuf that others may have, not only with ours."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROTOS = REPOSITORY / "protos"

NEWEST_PROTOBUF = "7.36.2"

pytestmark = pytest.mark.timeout(300)


@pytest.mark.long
def test_the_generated_code_works_with_the_newest_protobuf(tmp_path: Path):
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    subprocess.run(
        [
            *(str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"),
            f"protobuf=={NEWEST_PROTOBUF}",
            "grpcio",
            "googleapis-common-protos",
        ],
        check=True,
    )
    modules = [
        path.relative_to(PROTOS / "python/src").with_suffix("").as_posix().replace("/", ".")
        for path in sorted((PROTOS / "python/src").rglob("*_pb2*.py"))
    ]
    assert "pollard.inference.grpc_service_pb2" in modules
    code = "\n".join(
        [
            "import google.protobuf",
            f"assert google.protobuf.__version__ == {NEWEST_PROTOBUF!r}",
            *(f"import {module}" for module in modules),
            "from pollard.inference import grpc_service_pb2 as pb",
            "request = pb.ModelInferRequest(model_name='m', raw_input_contents=[b'x'])",
            "assert pb.ModelInferRequest.FromString(request.SerializeToString()) == request",
        ]
    )
    subprocess.run(
        [str(python), "-W", "error", "-c", code],
        check=True,
        env={"PYTHONPATH": str(PROTOS / "python/src")},
    )


def test_the_contracts_compile_with_an_old_protoc(tmp_path: Path):
    protoc = shutil.which("protoc")
    if protoc is None:
        pytest.skip("there is no protoc; Debian's package protobuf-compiler has one")
    sources = [
        path.relative_to(PROTOS).as_posix()
        for folder in ("inference", "pollard")
        for path in sorted((PROTOS / folder).rglob("*.proto"))
    ]
    assert sources
    subprocess.run(
        [
            *(protoc, f"-I{PROTOS}", f"-I{PROTOS / 'third_party'}"),
            *("--cpp_out", str(tmp_path), *sources),
        ],
        check=True,
    )
    assert list(tmp_path.rglob("*.pb.h"))
