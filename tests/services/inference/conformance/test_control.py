"""Loading and unloading models of a repository, under load, in each mode."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def refused(call, *arguments: object, **options: object) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **options)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def states(client, name: str) -> dict[str, tuple[str, str]]:
    index = client.get_model_repository_index().models
    return {entry.version: (entry.state, entry.reason) for entry in index if entry.name == name}


@pytest.fixture
def explicit(serve, zoo, tmp_path) -> Iterator[triton.InferenceServerClient]:
    """A client of a server with explicit control and nothing loaded."""
    zoo["put"](tmp_path, "adder", {1: zoo["adder"](1)}, "max_batch_size: 8")
    with (
        serve(tmp_path, model_control="explicit") as address,
        triton.InferenceServerClient(address) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def shared(serve, zoo, tmp_path_factory) -> Iterator[tuple[triton.InferenceServerClient, Path]]:
    """As `explicit`, for tests that leave nothing behind; and the repository."""
    root = tmp_path_factory.mktemp("shared")
    zoo["put"](root, "adder", {1: zoo["adder"](1)}, "max_batch_size: 8")
    with (
        serve(root, model_control="explicit") as address,
        triton.InferenceServerClient(address) as client,
    ):
        yield client, root


@pytest.fixture
def ask(inputs) -> Callable[..., float]:
    """Returns a function that asks a model once and gives what it adds."""

    def ask(client, version: str = "", name: str = "adder") -> float:
        answer = client.infer(name, [inputs["x"]()], model_version=version, client_timeout=30)
        values = answer.as_numpy("y")
        # The answer is that of the version it names.
        number = float(answer.get_response().model_version)
        assert (values == number).all() or version == "any"
        return float(values[0, 0])

    return ask


def test_models_are_loaded_and_unloaded_by_request(explicit, ask, zoo, tmp_path) -> None:
    assert refused(ask, explicit)[0] == "NOT_FOUND"
    assert states(explicit, "adder") == {"": ("UNAVAILABLE", "not loaded")}
    explicit.load_model("adder")
    assert ask(explicit) == 1
    explicit.load_model("adder")
    zoo["put"](tmp_path, "adder", {2: zoo["adder"](2)})
    explicit.load_model("adder")
    assert ask(explicit) == 2
    # By its policy only the latest is served; the other is known.
    assert refused(ask, explicit, "1")[0] == "UNAVAILABLE"
    explicit.unload_model("adder")
    status, words = refused(ask, explicit)
    assert (status, "not at ready state" in words) == ("UNAVAILABLE", True)
    until(lambda: states(explicit, "adder")["2"] == ("UNAVAILABLE", "unloaded"))
    explicit.unload_model("adder")
    explicit.unload_model("nobody")
    explicit.load_model("adder")
    assert ask(explicit) == 2


def test_loads_that_fail_change_nothing(explicit, ask, zoo, tmp_path) -> None:
    explicit.load_model("adder")
    status, words = refused(explicit.load_model, "nobody")
    assert status == "INTERNAL"
    assert "failed to load 'nobody', failed to poll from model repository" in words
    for name in ("../adder", "", ".", "a/b", "x" * 5000):
        assert refused(explicit.load_model, name)[0] == "INTERNAL"
    assert {entry.name for entry in explicit.get_model_repository_index().models} == {"adder"}

    folder = zoo["put"](tmp_path, "adder", {2: b"no model"})
    status, words = refused(explicit.load_model, "adder")
    assert status == "INVALID_ARGUMENT"
    assert "load failed for model 'adder': onnxruntime cannot load the model" in words
    assert ask(explicit) == 1
    assert states(explicit, "adder")["1"][0] == "READY"
    assert states(explicit, "adder")["2"][0] == "UNAVAILABLE"
    assert refused(ask, explicit, "2")[0] == "UNAVAILABLE"

    (folder / "config.pbtxt").write_text("max_batch_size: what")
    status, words = refused(explicit.load_model, "adder")
    assert (status, "failed to poll" in words) == ("INTERNAL", True)
    (folder / "config.pbtxt").write_text('name: "other"')
    assert refused(explicit.load_model, "adder")[0] == "INTERNAL"
    assert ask(explicit) == 1

    zoo["put"](tmp_path, "adder", {2: zoo["adder"](2)}, "max_batch_size: 8")
    explicit.load_model("adder")
    assert ask(explicit) == 2


def test_files_and_configuration_may_come_with_the_request(explicit, ask, zoo) -> None:
    config = json.dumps({"max_batch_size": 2})
    explicit.load_model("adder", config=config, files={"file:7/model.onnx": zoo["adder"](7)})
    assert ask(explicit) == 7
    assert explicit.get_model_config("adder").config.max_batch_size == 2
    # A model that is not in the repository at all.
    explicit.load_model("new", config="{}", files={"file:3/model.onnx": zoo["adder"](3)})
    assert ask(explicit, name="new") == 3
    # Without files the repository's are taken.
    explicit.load_model("adder", config=json.dumps({"maxBatchSize": 5}))
    assert ask(explicit) == 1
    assert explicit.get_model_config("adder").config.max_batch_size == 5
    explicit.load_model("adder")
    assert explicit.get_model_config("adder").config.max_batch_size == 8


@pytest.mark.parametrize(
    ("parameters", "status", "words"),
    [
        ({"mine": "1"}, "INVALID_ARGUMENT", "unrecognized parameter 'mine'"),
        ({"config": True}, "INVALID_ARGUMENT", "'config' must be a string"),
        ({"config": "{"}, "INTERNAL", "failed to parse 'config' override"),
        ({"config": '{"input": [{"name": "z"}]}'}, "INVALID_ARGUMENT", "unexpected inference"),
        ({"file:1/model.onnx": b"x"}, "INVALID_ARGUMENT", "requires also the parameter 'config'"),
        ({"config": "{}", "file:../x": b"x"}, "INVALID_ARGUMENT", "a path within"),
        ({"config": "{}", "file:/x": b"x"}, "INVALID_ARGUMENT", "a path within"),
        ({"config": "{}", "file:": b"x"}, "INVALID_ARGUMENT", "a path within"),
        ({"config": "{}", "file:1/model.onnx": "x"}, "INVALID_ARGUMENT", "bytes of a file"),
        ({"config": "{}", "file:1/model.onnx": b"x"}, "INVALID_ARGUMENT", "cannot load"),
        ({"config": "{}", "file:model.onnx": b"x"}, "INVALID_ARGUMENT", "at least one version"),
    ],
)
def test_load_parameters_that_are_wrong(shared, ask, parameters, status, words) -> None:
    import grpc

    from pollard.inference import grpc_service_pb2 as pb
    from pollard.inference import grpc_service_pb2_grpc as pb_grpc

    client, _ = shared
    client.load_model("adder")
    request = pb.RepositoryModelLoadRequest(model_name="adder")
    for name, value in parameters.items():
        kind = {str: "string_param", bytes: "bytes_param", bool: "bool_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    target = client._channel._channel.target().decode().removeprefix("dns:///")
    with grpc.insecure_channel(target) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.RepositoryModelLoad(request, timeout=30)
    assert caught.value.code().name == status
    assert words in caught.value.details()
    assert ask(client) == 1


CONFIGS = [
    ("max_batch_size: -1", "'max_batch_size' must be non-negative"),
    ('backend: "python"', "wants the backend 'python'"),
    ("sequence_batching {}", "sequences of requests are not offered"),
    ("ensemble_scheduling {}", "ensembles are not offered"),
    ("model_transaction_policy { decoupled: true }", "configured as decoupled"),
    ("instance_group { kind: KIND_GPU }", "no GPUs are available"),
    ('input { name: "x" dims: [5] } max_batch_size: 1', "the model expects 1 dimensions"),
    ('input { name: "x" data_type: TYPE_INT8 dims: [4] }', "the graph has TYPE_FP32"),
    ('output { name: "z" dims: [4] }', "unexpected inference output 'z'"),
    ("version_policy { specific { versions: 9 } }", "at least one version must be available"),
    ('default_model_filename: "../../x"', "leads out of its folder"),
    ('default_model_filename: "other.onnx"', "unable to find '1/other.onnx'"),
    (
        'output { name: "y" label_filename: "no.txt" }',
        "'no.txt' of model 'configured' cannot be read",
    ),
    (
        'max_batch_size: 4 model_warmup { name: "w" batch_size: 5 inputs { key: "x" value { '
        "data_type: TYPE_FP32 dims: 4 zero_data: true } } }",
        "must have a batch_size from 1 to 4",
    ),
    ("dynamic_batching { preferred_batch_size: 9 } max_batch_size: 8", "preferred size"),
]


@pytest.mark.parametrize(("config", "words"), CONFIGS, ids=[words for _, words in CONFIGS])
def test_configurations_that_cannot_be_carried_out(shared, zoo, config, words) -> None:
    client, repository = shared
    zoo["put"](repository, "configured", {1: zoo["adder"](1)}, config)
    status, message = refused(client.load_model, "configured")
    assert status == "INVALID_ARGUMENT"
    assert words in message


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["3"]),
        ("version_policy { latest { num_versions: 2 } }", ["2", "3"]),
        ("version_policy { all {} }", ["1", "2", "3"]),
        ("version_policy { specific { versions: [1, 3, 9] } }", ["1", "3"]),
    ],
)
def test_version_policies(explicit, ask, zoo, tmp_path, policy, served) -> None:
    folder = zoo["put"](tmp_path, "adder", {n: zoo["adder"](n) for n in (1, 2, 3)}, policy)
    if not policy:
        (folder / "config.pbtxt").unlink()
    for name in ("0", "01", "x", ".4"):
        (folder / name).mkdir()
    explicit.load_model("adder")
    assert list(explicit.get_model_metadata("adder").versions) == served
    assert ask(explicit) == 3


def test_warm_up_requests_are_run_before_the_version_is_ready(explicit, ask, zoo, tmp_path) -> None:
    folder = zoo["put"](
        tmp_path,
        "adder",
        {1: zoo["adder"](1)},
        """
        max_batch_size: 8
        model_warmup { name: "zeros" batch_size: 2 count: 3
          inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 zero_data: true } } }
        model_warmup { name: "random" batch_size: 1
          inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 random_data: true } } }
        model_warmup { name: "file" batch_size: 1
          inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 input_data_file: "data" } } }
        """,
    )
    assert "cannot be read" in refused(explicit.load_model, "adder")[1]
    (folder / "warmup").mkdir()
    (folder / "warmup/data").write_bytes(bytes(15))
    assert "Expected 16, got 15" in refused(explicit.load_model, "adder")[1]
    (folder / "warmup/data").write_bytes(bytes(16))
    explicit.load_model("adder")
    assert ask(explicit) == 1


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    explicit, ask, zoo, tmp_path
) -> None:
    explicit.load_model("adder")
    # A file with a hole in it: more than this machine's memory, and nothing on its disk.
    huge = tmp_path / "adder/2/model.onnx"
    huge.parent.mkdir()
    with huge.open("wb") as file:
        file.truncate(psutil.virtual_memory().total)
    status, words = refused(explicit.load_model, "adder")
    assert status == "INVALID_ARGUMENT"
    assert "loading it beside what runs takes" in words
    assert "unload a revision" in words
    # What runs serves on, and what fits is loaded.
    assert ask(explicit) == 1
    assert states(explicit, "adder")["1"][0] == "READY"
    state, reason = states(explicit, "adder")["2"]
    assert (state, "beside what runs" in reason) == ("UNAVAILABLE", True)
    zoo["put"](tmp_path, "adder", {2: zoo["adder"](2)})
    explicit.load_model("adder")
    assert ask(explicit) == 2


@contextlib.contextmanager
def under_load(address: str, inputs) -> Iterator[list[int]]:
    """Keep asking "adder" from four threads; at the end nothing may have failed."""
    counts, failures, stop = [0] * 4, [], threading.Event()

    def hammer(number: int) -> None:
        with triton.InferenceServerClient(address) as client:
            while not stop.is_set():
                try:
                    answer = client.infer("adder", [inputs["x"]()], client_timeout=30)
                    version = float(answer.get_response().model_version)
                    assert (answer.as_numpy("y") == version).all()
                    counts[number] += 1
                except Exception as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert all(counts)


def test_no_request_fails_while_models_are_loaded_again(serve, zoo, inputs, ask, tmp_path) -> None:
    adder = zoo["adder"]
    zoo["put"](tmp_path, "adder", {1: adder(1, weights=2_000_000)})
    with (
        serve(tmp_path, model_control="explicit", load_model=["adder"]) as address,
        triton.InferenceServerClient(address) as client,
        under_load(address, inputs),
    ):
        for version in range(2, 12):
            zoo["put"](tmp_path, "adder", {version: adder(version, weights=2_000_000)})
            client.load_model("adder")
            assert ask(client) == version
        zoo["put"](tmp_path, "adder", {12: b"broken"})
        assert refused(client.load_model, "adder")[0] == "INVALID_ARGUMENT"
        assert ask(client) == 11


def test_no_request_fails_while_the_folder_is_followed(serve, zoo, inputs, ask, tmp_path) -> None:
    adder = zoo["adder"]
    folder = zoo["put"](tmp_path, "adder", {1: adder(1)})
    with (
        serve(tmp_path, model_control="poll", poll_seconds=0.05) as address,
        triton.InferenceServerClient(address) as client,
    ):
        with under_load(address, inputs):
            for version in range(2, 5):
                zoo["put"](tmp_path, "adder", {version: adder(version)})
                until(lambda version=version: ask(client) == version)
            zoo["put"](tmp_path, "adder", {9: b"broken"})
            until(lambda: states(client, "adder").get("9", ("", ""))[0] == "UNAVAILABLE")
            assert ask(client) == 4
            # One version goes, as by a roll-back.
            shutil.rmtree(folder / "9")
            shutil.rmtree(folder / "4")
            until(lambda: ask(client) == 3)
            zoo["put"](tmp_path, "other", {5: adder(5)})
            until(lambda: client.is_model_ready("other"))
        status, words = refused(client.load_model, "adder")
        assert (status, "polling is enabled" in words) == ("UNAVAILABLE", True)
        assert refused(client.unload_model, "adder")[0] == "UNAVAILABLE"
        shutil.rmtree(folder)
        until(lambda: not client.is_model_ready("adder"))
        assert ask(client, name="other") == 5


def test_without_control_what_was_there_is_served(serve, zoo, ask, tmp_path) -> None:
    zoo["put"](tmp_path, "adder", {1: zoo["adder"](1)})
    zoo["put"](tmp_path, "broken", {1: b"broken"})
    with serve(tmp_path) as address, triton.InferenceServerClient(address) as client:
        assert ask(client) == 1
        assert refused(client.load_model, "adder")[0] == "UNAVAILABLE"
        assert refused(client.unload_model, "adder")[0] == "UNAVAILABLE"
        assert states(client, "broken")["1"][0] == "UNAVAILABLE"
        zoo["put"](tmp_path, "adder", {2: zoo["adder"](2)})
        assert ask(client) == 1


def test_requests_that_wait_for_others_fill_batches(serve, zoo, inputs, tmp_path) -> None:
    zoo["put"](
        tmp_path,
        "adder",
        {1: zoo["adder"](1)},
        """
        max_batch_size: 4  instance_group { count: 1 kind: KIND_CPU }
        dynamic_batching { preferred_batch_size: 4  max_queue_delay_microseconds: 10000000 }
        """,
    )
    with serve(tmp_path) as address, triton.InferenceServerClient(address) as client:
        answers: queue.Queue = queue.Queue()
        for number in range(8):
            client.async_infer(
                "adder",
                [inputs["x"](np.full((1, 4), number))],
                lambda result, error: answers.put((result, error)),
                request_id=str(number),
            )
        for _ in range(8):
            result, error = answers.get(timeout=30)
            assert error is None
            assert (result.as_numpy("y") == int(result.get_response().id) + 1).all()
        (stats,) = client.get_inference_statistics("adder").model_stats
        assert (stats.inference_count, stats.execution_count) == (8, 2)
        assert [batch.batch_size for batch in stats.batch_stats] == [4]


def load_in_background(client, name: str, **options: object) -> tuple[threading.Thread, list]:
    """Load a model on another thread; gives the thread and, at its end, the outcome."""
    outcome: list[InferenceServerException | None] = []

    def load() -> None:
        try:
            client.load_model(name, **options)
            outcome.append(None)
        except InferenceServerException as error:
            outcome.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("newer", ["load", "unload"])
def test_a_load_that_a_newer_order_overtakes_is_out_dated(
    explicit, ask, zoo, tmp_path, newer
) -> None:
    explicit.load_model("adder")
    # Its runs before it is ready take a while.
    zoo["put"](tmp_path, "adder", {2: zoo["slow"](1500)}, "max_batch_size: 1")
    thread, outcome = load_in_background(explicit, "adder")
    until(lambda: states(explicit, "adder").get("2") == ("LOADING", ""))
    assert ask(explicit) == 1
    if newer == "load":
        explicit.load_model("adder", config="{}", files={"file:3/model.onnx": zoo["adder"](3)})
        assert ask(explicit) == 3
    else:
        explicit.unload_model("adder")
        assert refused(ask, explicit)[0] == "UNAVAILABLE"
    thread.join(60)
    (error,) = outcome
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "load failed for model 'adder': it is out-dated" in error.message()
    state, reason = states(explicit, "adder").get("2", ("UNAVAILABLE", "out-dated"))
    assert (state, "out-dated" in reason) == ("UNAVAILABLE", True)


def test_loads_of_the_same_do_not_overtake_one_another(explicit, ask, zoo, tmp_path) -> None:
    zoo["put"](tmp_path, "adder", {2: zoo["slow"](600)}, "max_batch_size: 1")
    under_way = [load_in_background(explicit, "adder") for _ in range(3)]
    until(lambda: states(explicit, "adder").get("2") == ("LOADING", ""))
    under_way.append(load_in_background(explicit, "adder"))
    # What cannot be read does not overtake anything either.
    assert refused(explicit.load_model, "adder", config="{")[0] == "INTERNAL"
    for thread, _ in under_way:
        thread.join(60)
    assert [outcome for _, outcome in under_way] == [[None]] * 4
    assert states(explicit, "adder")["2"] == ("READY", "")
