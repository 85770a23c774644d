"""How grpcio's core reads and writes is chosen before it is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pollard.services.common.lifecycle import GrpcServer
from pollard.services.inference import main
from pollard.services.inference.frontends.core import CoreFront
from pollard.services.inference.frontends.experiments import THREADLESS

CHOOSE = """
import os, sys
from pollard.services.inference.settings import InferenceSettings
settings = InferenceSettings.load({"frontend": sys.argv[1]})
assert "grpc" not in sys.modules
if sys.argv[2]:
    os.environ["GRPC_EXPERIMENTS"] = sys.argv[2]
settings.prepare_process()
print(os.environ.get("GRPC_EXPERIMENTS", "nothing"))
"""

BEGIN_ANEW = """
import os
import grpc
from pollard.services.inference.frontends.experiments import begin_anew, choose_threadless
choose_threadless()
print(os.getpid(), os.environ.get("GRPC_EXPERIMENTS", "nothing"), flush=True)
begin_anew()
"""


def output(*command: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", *command], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("frontend", "given", "chosen"),
    [
        ("auto", "", THREADLESS),
        ("core", "", THREADLESS),
        ("core", "of-the-user", "of-the-user"),
        ("grpcio", "", "nothing"),
    ],
)
def test_it_is_chosen_for_the_core_alone(frontend: str, given: str, chosen: str) -> None:
    assert output(CHOOSE, frontend, given) == chosen + "\n"


def test_a_process_that_has_grpcio_already_begins_anew_once() -> None:
    first, second = (line.split() for line in output(BEGIN_ANEW).splitlines())
    assert first[0] == second[0]
    assert (first[1], second[1]) == ("nothing", THREADLESS)


@pytest.mark.parametrize(("missing", "kind"), [([], CoreFront), (["poll"], GrpcServer)])
async def test_auto_is_the_core_where_there_is_one(
    start_server, monkeypatch: pytest.MonkeyPatch, missing: list[str], kind: type
) -> None:
    monkeypatch.setattr(main, "missing_from_core", lambda: missing)
    server = await start_server()
    assert type(server.grpc) is kind
