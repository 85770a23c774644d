"""`pollard up`: starts, answers, stops, and leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pollard.client import (
    FailedPrecondition,
    InferenceClient,
    InvalidArgument,
    ModelsClient,
    NotFound,
    VisionClient,
)
from pollard.runtime.bundle import Bundle
from pollard.runtime.sessions import open_session

BundleMaker = Callable[..., Bundle]
Pollard = Callable[..., subprocess.CompletedProcess[str]]
PIXELS = (np.arange(64, dtype=np.uint8) * 3).reshape(8, 8)


def _expected(bundle: Bundle) -> np.ndarray:
    session = open_session(bundle.model_path("cpu-fp32"))
    return np.asarray(session.run({"image": PIXELS[None, :, :, None]})["scores"])


def test_a_model_goes_all_the_way_by_the_command_line(
    up: Any, pollard: Pollard, make_bundle: BundleMaker, tmp_path: Path
) -> None:
    first, second = make_bundle(seed=1), make_bundle(seed=2)
    image = tmp_path / "image.png"
    from pollard.client._images import png

    image.write_bytes(png(PIXELS))
    env = {
        "POLLARD_MODELS_ADDRESS": up.address("models"),
        "POLLARD_VISION_ADDRESS": up.address("preprocess"),
    }

    pushed = pollard("models", "push", first.path, "--model", "cli", env=env)
    assert pushed.returncode == 0, pushed.stderr
    assert "becomes 'production'" in pushed.stdout
    assert "production now serves revision 1" in pushed.stdout
    pushed = pollard("models", "push", second.path, "--model", "cli", env=env)
    assert "pollard models alias cli production 2" in pushed.stdout

    def predicted() -> dict[str, Any]:
        done = pollard("predict", image, "--model", "cli", "--json", env=env)
        assert done.returncode == 0, done.stderr
        (answer,) = json.loads(done.stdout)
        return answer  # type: ignore[no-any-return]

    answer = predicted()
    assert (answer["revision"], answer["labels"][0]["index"]) == (1, _expected(first).argmax())
    moved = pollard("models", "alias", "cli", "production", "2", env=env)
    assert "production now serves revision 2" in moved.stdout
    answer = predicted()
    assert (answer["revision"], answer["labels"][0]["index"]) == (2, _expected(second).argmax())
    assert pollard("models", "rollback", "cli", env=env).returncode == 0
    assert predicted()["revision"] == 1

    shown = json.loads(pollard("models", "show", "cli", "--json", env=env).stdout)
    assert [item["revision"] for item in shown["revisions"]] == [2, 1]
    assert shown["revisions"][1]["bundle_sha256"] == first.digest
    fleet = json.loads(pollard("fleet", "--json", env=env).stdout)
    assert {item["kind"] for item in fleet} == {"INFERENCE", "PREPROCESS"}
    assert all(item["connected"] for item in fleet)

    target = tmp_path / "pulled"
    assert pollard("models", "pull", "cli", target, "--revision", "2", env=env).returncode == 0
    assert Bundle.open(target).digest == second.digest

    # What goes on all the same is told as the command takes it.
    refused = pollard("models", "delete", "cli", "--yes", env=env)
    assert refused.returncode == 1
    assert refused.stderr.endswith("(MODEL_IN_USE)\nOn the command line: --force\n")
    again = pollard("models", "push", first.path, "--model", "cli", env=env)
    assert "It is served already, as 'production'." in again.stdout
    wider = pollard("models", "push", make_bundle(size=10).path, "--model", "cli", env=env)
    assert "pollard models alias cli production 3" in wider.stdout
    refused = pollard("models", "alias", "cli", "production", "3", env=env)
    assert refused.stderr.endswith("On the command line: --allow-signature-change\n")
    refused = pollard("models", "rollout", "cli", "3", env=env)
    assert "move the alias at once instead" in refused.stderr
    assert refused.stderr.endswith(
        "pollard models alias cli production 3 --allow-signature-change\n"
    )

    refused = pollard("models", "delete", "cli", "--revision", "1", "--yes", env=env)
    assert refused.returncode == 1
    assert "REVISION_IN_USE" in refused.stderr
    assert pollard("models", "delete", "cli", "--force", "--yes", env=env).returncode == 0
    gone = pollard("predict", image, "--model", "cli", env=env)
    assert gone.returncode == 1
    assert "Traceback" not in gone.stderr


def test_every_service_has_health_and_reflection(up: Any) -> None:
    for service, method in (
        ("inference", "inference.GRPCInferenceService"),
        ("preprocess", "pollard.vision.v1.VisionService"),
        ("models", "pollard.models.v1.ModelService"),
    ):
        with grpc.insecure_channel(up.address(service)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", method):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=method)
            (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=10)
            assert answer.file_descriptor_response.file_descriptor_proto


def test_tensors_and_images_get_the_answers_of_the_runtime(
    up: Any, make_bundle: BundleMaker
) -> None:
    bundle = make_bundle(seed=3)
    with (
        ModelsClient(up.address("models")) as models,
        InferenceClient(up.address("inference")) as inference,
        VisionClient(up.address("preprocess")) as vision,
    ):
        assert models.push(bundle.path, "api", alias="production").alias is not None
        expected = _expected(bundle)
        found = inference.infer("api", {"image": PIXELS[None, :, :, None]})
        np.testing.assert_allclose(found.outputs["scores"], expected, rtol=1e-5)
        tensor = vision.transform([PIXELS, PIXELS], "api")
        found = inference.infer("api", {tensor.name: tensor.tensor}, version=tensor.revision)
        np.testing.assert_allclose(found.outputs["scores"], np.repeat(expected, 2, 0), rtol=1e-5)
        answer = vision.predict(PIXELS, "api", top_k=1)
        assert [label.index for label in answer.labels] == [expected.argmax()]
        assert inference.server_live()
        assert inference.server_ready()
        assert inference.model_ready("api")
        assert not inference.model_ready("nothing")
        assert inference.model_metadata("api").inputs[0].shape == (-1, 8, 8, 1)


def test_bad_requests_get_their_own_errors(up: Any, make_bundle: BundleMaker) -> None:
    with (
        ModelsClient(up.address("models")) as models,
        InferenceClient(up.address("inference")) as inference,
        VisionClient(up.address("preprocess")) as vision,
    ):
        models.push(make_bundle(seed=4).path, "bad", alias="production")
        models.push(make_bundle(seed=5, size=6).path, "bad")
        for content in (b"", b"no image at all"):
            with pytest.raises(InvalidArgument) as caught:
                vision.predict(content, "bad")
            assert caught.value.reason
        for kwargs in ({"revision": 99}, {"alias": "nope"}):
            with pytest.raises(NotFound):
                vision.predict(PIXELS, "bad", **kwargs)
        with pytest.raises(NotFound):
            vision.predict(PIXELS, "unknown")
        with pytest.raises(NotFound):
            inference.infer("unknown", {"image": PIXELS[None, :, :, None]})
        with pytest.raises(InvalidArgument):
            inference.infer("bad", {"image": PIXELS})
        with pytest.raises(InvalidArgument):
            inference.infer("bad", {"image": PIXELS[None, :, :, None].astype(np.float32)})
        with pytest.raises(FailedPrecondition):
            models.set_alias("bad", "production", 2)
        # After all of this it serves as before.
        assert vision.predict(PIXELS, "bad").revision == 1


@pytest.mark.long
def test_it_stops_cleanly_on_sigterm_and_serves_the_same_after_a_restart(
    start_up: Callable[..., Any],
    make_bundle: BundleMaker,
    processes_of: Callable[[int], list[psutil.Process]],
    gone: Callable[[list[psutil.Process]], None],
) -> None:
    bundle = make_bundle(seed=6)
    first = start_up()
    processes = processes_of(first.process.pid)
    assert len(processes) >= 4
    with ModelsClient(first.address("models")) as models:
        models.push(bundle.path, "kept", alias="production", notes="stays")
    assert first.stop(signal.SIGTERM) == 0, first.said()
    gone(processes)
    assert not first.ready_file.exists()
    assert "Traceback" not in first.said()

    again = start_up(data_dir=first.data_dir)
    with (
        ModelsClient(again.address("models")) as models,
        VisionClient(again.address("preprocess")) as vision,
    ):
        assert models.revision("kept").notes == "stays"
        assert vision.predict(PIXELS, "kept").labels[0].index == _expected(bundle).argmax()
    assert again.stop(signal.SIGINT) == 0, again.said()


def test_the_models_service_gives_way_to_those_that_answer_requests(
    up: Any, processes_of: Callable[[int], list[psutil.Process]]
) -> None:
    own = os.getpriority(os.PRIO_PROCESS, up.process.pid)
    priorities = {}
    for process in processes_of(up.process.pid):
        command = process.cmdline()
        if "pollard.services.up.child" in command:
            service = command[command.index("pollard.services.up.child") + 2]
            priorities[service] = process.nice()
    assert priorities["inference"] == priorities["preprocess"] == own
    assert priorities["models"] == min(own + 10, 19)


@pytest.mark.long
def test_killing_the_supervisor_kills_the_services(
    start_up: Callable[..., Any],
    processes_of: Callable[[int], list[psutil.Process]],
    gone: Callable[[list[psutil.Process]], None],
) -> None:
    up = start_up()
    processes = processes_of(up.process.pid)
    os.kill(up.process.pid, signal.SIGKILL)
    up.process.wait()
    gone(processes)


@pytest.mark.long
@pytest.mark.parametrize("log", ["closed", "full", "unread"])
def test_it_serves_on_when_its_log_takes_nothing(
    tmp_path: Path, pollard: Pollard, make_bundle: BundleMaker, log: str
) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    if log == "closed":
        os.close(reading)
    elif log == "full":
        os.close(writing)
        writing = os.open("/dev/full", os.O_WRONLY)
    ready = tmp_path / "ready.json"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pollard.client.cli", "up", "--port-base", "0"),
            *("--data-dir", str(tmp_path / "data"), "--ready-file", str(ready)),
        ],
        stdout=writing,
        stderr=writing,
        env=os.environ
        | {
            f"POLLARD_{service}_{name}": value
            for service in ("MODELS", "INFERENCE", "PREPROCESS")
            for name, value in (("ACCESS_LOG", "all"), ("ACCESS_LOG_PER_SECOND", "100000"))
        },
    )
    os.close(writing)
    try:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.05)
        services = json.loads(ready.read_text())["services"]
        address = services["models"]["address"]
        assert pollard("models", "list", "--server", address).returncode == 0
        with (
            ModelsClient(address) as models,
            VisionClient(services["preprocess"]["address"]) as vision,
        ):
            models.push(make_bundle(seed=1).path, "m", alias="production")
            # Two lines each: the pipes between the services and this process fill, too.
            for _ in range(1000):
                vision.predict(PIXELS, "m")
            models.push(make_bundle(seed=2).path, "m", alias="production")
            assert vision.predict(PIXELS, "m").revision == 2
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        if log == "unread":
            os.close(reading)


def test_a_port_in_use_is_told_and_nothing_is_left_running(
    start_up: Callable[..., Any], pollard: Pollard, tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = pollard(
            "up",
            "--port-base",
            "0",
            "--preprocess-port",
            str(port),
            "--data-dir",
            tmp_path / "data",
        )
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1, wanted for preprocess, is in use" in done.stderr
    assert "--preprocess-port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_second_manager_on_one_store_is_refused_and_the_first_goes_on(
    start_up: Callable[..., Any],
) -> None:
    first = start_up()
    second = start_up(data_dir=first.data_dir, wait=False)
    assert second.process.wait(timeout=60) == 1
    assert "models ended with exit code 1" in second.said()
    assert str(first.data_dir) in second.said()
    assert "Traceback" not in second.said()
    with ModelsClient(first.address("models")) as models:
        assert models.models() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "refusing to listen"),
        (["--config", "/no/such/file.toml"], "no settings file"),
        (["--data-dir", "/proc/nothing"], "cannot make the data directory"),
        (["--inference-port", "9", "--models-port", "9"], "cannot share a port"),
    ],
)
def test_what_cannot_be_started_is_told_in_words(
    pollard: Pollard, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = pollard("up", "--port-base", "0", "--data-dir", tmp_path / "data", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
