"""What the protocol offers beside plain requests, through Triton's clients."""

from __future__ import annotations

import asyncio
import queue
import threading
import time

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc


def refused(call, *arguments: object, **options: object) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **options)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("timeout", "string_param", "1"),
        ("timeout", "double_param", 1.0),
        ("priority", "bool_param", True),
        ("sequence_start", "int64_param", 1),
        ("triton_enable_empty_final_response", "int64_param", 1),
        ("triton_new", "int64_param", 1),
    ],
)
def test_parameters_of_the_wrong_type_and_reserved_ones(address, name, field, value) -> None:
    # Triton's clients refuse some of these themselves; other clients do not.
    request = pb.ModelInferRequest(model_name="adder", raw_input_contents=[bytes(16)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    setattr(request.parameters[name], field, value)
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(request, timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert name in caught.value.details()


def test_readiness(client) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for name, version, ready in [
        ("adder", "", True),
        ("adder", "1", True),
        ("adder", "9", False),
        ("nobody", "", False),
        ("broken", "", False),
    ]:
        assert client.is_model_ready(name, version) == ready
    status, words = refused(client.is_model_ready, "adder", "new")
    assert status == "INVALID_ARGUMENT"
    assert "failed to get model version" in words


def test_metadata(client) -> None:
    server = client.get_server_metadata()
    assert server.name == "pollard"
    assert {"classification", "statistics", "system_shared_memory"} <= set(server.extensions)
    metadata = client.get_model_metadata("adder")
    assert list(metadata.versions) == ["1", "2"]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("x", "FP32", [-1, 4])
    ]
    assert list(client.get_model_metadata("flat").inputs[0].shape) == [3]
    assert refused(client.get_model_metadata, "nobody")[0] == "NOT_FOUND"
    assert refused(client.get_model_metadata, "adder", "9")[0] == "NOT_FOUND"
    assert refused(client.get_model_metadata, "broken")[0] == "UNAVAILABLE"


def test_configuration(client) -> None:
    config = client.get_model_config("adder").config
    assert (config.max_batch_size, config.platform, config.backend) == (
        8,
        "onnxruntime_onnx",
        "onnxruntime",
    )
    assert config.output[0].label_filename == "labels.txt"
    assert list(config.input[0].dims) == [4]
    # Completed from the graph.
    config = client.get_model_config("pair").config
    assert config.max_batch_size == 4
    assert config.HasField("dynamic_batching")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("a", 11, [2]),
        ("b", 8, [2]),
    ]
    assert client.get_model_config("free").config.max_batch_size == 0
    assert client.get_model_config("slower").config.instance_group[0].count == 1
    assert refused(client.get_model_config, "nobody")[0] == "NOT_FOUND"


def test_statistics_count(client, inputs) -> None:
    def read() -> object:
        (stats,) = client.get_inference_statistics("adder", "1").model_stats
        return stats

    before = read()
    for rows in (1, 1, 3):
        client.infer("adder", [inputs["x"](np.zeros((rows, 4)))], model_version="1")
    after = read()
    assert after.inference_count - before.inference_count == 5
    assert after.execution_count - before.execution_count == 3
    assert after.last_inference >= before.last_inference > time.time() * 1000 - 600_000 or (
        before.last_inference == 0
    )
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        now, then = getattr(after.inference_stats, name), getattr(before.inference_stats, name)
        assert now.count - then.count == 3
        assert now.ns >= then.ns
    assert after.inference_stats.success.ns >= after.inference_stats.compute_infer.ns > 0
    sizes = {batch.batch_size: batch.compute_infer.count for batch in after.batch_stats}
    assert sizes[3] >= 1
    everything = client.get_inference_statistics().model_stats
    assert {("adder", "1"), ("adder", "2"), ("flat", "1")} <= {
        (stats.name, stats.version) for stats in everything
    }
    for name, version in (("nobody", ""), ("adder", "9"), ("broken", "")):
        status, words = refused(client.get_inference_statistics, name, version)
        assert (status, "is not available" in words) == ("INVALID_ARGUMENT", True)


def test_the_index_lists_what_is_loaded_and_what_is_not(client) -> None:
    index = {(m.name, m.version): m for m in client.get_model_repository_index().models}
    assert index["adder", "2"].state == "READY"
    broken = next(entry for (name, _), entry in index.items() if name == "broken")
    assert broken.state == "UNAVAILABLE"
    assert "onnxruntime cannot load the model" in broken.reason


def test_one_repository(address) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for method, request in (
            (stub.RepositoryIndex, pb.RepositoryIndexRequest(repository_name="r")),
            (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(repository_name="r")),
            (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(repository_name="r")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                method(request, timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_log_settings(client) -> None:
    first = client.get_log_settings().settings
    assert first["log_info"].bool_param
    assert first["log_verbose_level"].uint32_param == 0
    changed = client.update_log_settings({"log_info": False, "log_verbose_level": 1}).settings
    assert not changed["log_info"].bool_param
    assert changed["log_verbose_level"].uint32_param == 1
    client.update_log_settings({"log_info": True, "log_verbose_level": 0})
    assert refused(client.update_log_settings, {"log_nothing": True})[0] == "INVALID_ARGUMENT"
    assert refused(client.update_log_settings, {"log_format": "mine"})[0] == "INVALID_ARGUMENT"
    assert refused(client.update_log_settings, {"log_file": "/tmp/x"})[0] == "UNIMPLEMENTED"  # noqa: S108


def test_trace_settings(client) -> None:
    assert list(client.get_trace_settings().settings["trace_level"].value) == ["OFF"]
    client.update_trace_settings(settings={"trace_level": ["OFF"]})
    status, _ = refused(client.update_trace_settings, settings={"trace_level": ["TIMESTAMPS"]})
    assert status == "UNIMPLEMENTED"
    assert refused(client.get_trace_settings, "nobody")[0] == "NOT_FOUND"


def test_cuda_regions(client) -> None:
    assert not client.get_cuda_shared_memory_status().regions
    assert refused(client.get_cuda_shared_memory_status, "r")[0] == "NOT_FOUND"
    status, words = refused(client.register_cuda_shared_memory, "r", b"aGFuZGxl", 0, 16)
    assert (status, "GPUs not supported" in words) == ("UNIMPLEMENTED", True)
    client.unregister_cuda_shared_memory("r")


def test_a_stream_answers_in_order(address, inputs) -> None:
    answers: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(200):
            # Some take long and some are wrong; none overtakes another.
            name = "slow" if number % 50 == 0 else "adder" if number % 7 else "nobody"
            client.async_stream_infer(
                name,
                [inputs["x"](np.full((1, 4), number))],
                request_id=str(number),
                enable_empty_final_response=number % 2 == 0,
            )
        for number in range(200):
            result, error = answers.get(timeout=60)
            if number % 50 and number % 7 == 0:
                assert "unknown model" in error.message()
                continue
            assert error is None
            response = result.get_response()
            assert response.id == str(number)
            final = response.parameters["triton_final_response"].bool_param
            assert final == (number % 2 == 0)
            expected = number if number % 50 == 0 else number + 2
            assert (result.as_numpy("y") == expected).all()
        client.stop_stream()


def test_a_strict_stream_ends_with_the_status(address, inputs) -> None:
    ended: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(
            lambda result, error: ended.put((result, error)), headers={"triton_grpc_error": "true"}
        )
        client.async_stream_infer("adder", [inputs["x"]()])
        assert ended.get(timeout=30)[1] is None
        client.async_stream_infer("nobody", [inputs["x"]()])
        _, error = ended.get(timeout=30)
        assert error.status() == "StatusCode.NOT_FOUND"
        client.stop_stream()


async def test_a_cancelled_stream_leaves_nothing_behind(address, inputs) -> None:
    async with triton_aio.InferenceServerClient(address) as client:

        async def requests():
            while True:
                yield {"model_name": "slow", "inputs": [inputs["x"]()]}
                await asyncio.sleep(0)

        stream = client.stream_infer(requests())
        result, error = await anext(aiter(stream))
        assert error is None
        assert result.as_numpy("y").shape == (1, 4)
        stream.cancel()
        # What it still had in the queue is not run: the next request need not wait for it.
        assert (await client.infer("slow", [inputs["x"]()])).as_numpy("y").shape == (1, 4)


def test_a_cancelled_request(address, inputs) -> None:
    outcomes: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        context = client.async_infer(
            "slow", [inputs["x"]()], lambda result, error: outcomes.put((result, error))
        )
        context.cancel()
        _, error = outcomes.get(timeout=30)
        assert error.status() == "StatusCode.CANCELLED"
        client.infer("slow", [inputs["x"]()])


@pytest.mark.long
def test_full_queues_timeouts_and_priorities(address, inputs) -> None:
    outcomes: queue.Queue = queue.Queue()
    order: list[str] = []
    with triton.InferenceServerClient(address) as client:
        started = time.monotonic()
        client.infer("slower", [inputs["x"]()])
        once = time.monotonic() - started

        def send(label: str, **options: object) -> None:
            def done(result, error) -> None:
                order.append(label)
                outcomes.put((label, error))

            client.async_infer("slower", [inputs["x"]()], done, **options)

        send("running")
        time.sleep(once / 4)
        for number in range(3):
            send(f"low {number}", priority=2)
        time.sleep(0.01)
        send("refused", priority=2)
        send("impatient", priority=1, timeout=1)
        send("high", priority=1)
        errors = dict(outcomes.get(timeout=60) for _ in range(7))
        failed = client.get_inference_statistics("slower").model_stats[0].inference_stats.fail
        assert failed.count >= 2
        assert failed.ns > 0
    assert errors["refused"].status() == "StatusCode.UNAVAILABLE"
    assert "Exceeds maximum queue size" in errors["refused"].message()
    assert errors["impatient"].status() == "StatusCode.UNAVAILABLE"
    assert "Request timeout expired" in errors["impatient"].message()
    served = [label for label in order if errors[label] is None]
    assert served == ["running", "high", "low 0", "low 1", "low 2"]


@pytest.mark.long
def test_requests_are_refused_while_the_server_stops(serve, zoo, inputs, tmp_path) -> None:
    zoo["put"](tmp_path, "slow", {1: zoo["slow"](1200)})
    outcomes: queue.Queue = queue.Queue()
    with serve(tmp_path) as address:
        client = triton.InferenceServerClient(address)
        client.start_stream(lambda result, error: outcomes.put(("stream", result, error)))
        client.async_stream_infer("slow", [inputs["x"]()])
        client.async_infer(
            "slow", [inputs["x"]()], lambda result, error: outcomes.put(("unary", result, error))
        )
        while client.get_inference_statistics("slow").model_stats[0].execution_count < 1:
            time.sleep(0.01)
    # It stopped with exit code 0 and answered what was under way.
    answered = [outcomes.get(timeout=30) for _ in range(3)]
    assert {kind for kind, result, _ in answered if result is not None} == {"unary", "stream"}
    (ended,) = [error for _, result, error in answered if result is None]
    assert ended.status() == "StatusCode.UNAVAILABLE"
    with pytest.raises(InferenceServerException) as caught:
        client.infer("slow", [inputs["x"]()], client_timeout=5)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    client.stop_stream()
    client.close()


def test_large_messages_where_they_are_allowed(serve, zoo, tmp_path) -> None:
    zoo["put"](tmp_path, "big", {1: zoo["adder"](1, shape=("n",))}, "max_batch_size: 0")
    size = 30_000_000  # 120 MB, beyond the usual limit.
    values = np.zeros(size, np.float32)
    made = triton.InferInput("x", [size], "FP32")
    made.set_data_from_numpy(values)
    with (
        serve(tmp_path, max_message_bytes=2**31 - 1) as address,
        triton.InferenceServerClient(address) as client,
    ):
        answer = client.infer("big", [made], client_timeout=120).as_numpy("y")
        assert answer.shape == (size,)
        assert (answer == 1).all()
    with serve(tmp_path) as address, triton.InferenceServerClient(address) as client:
        status, _ = refused(client.infer, "big", [made], client_timeout=120)
        assert status == "RESOURCE_EXHAUSTED"
        assert client.is_server_ready()


def test_many_clients_at_once(address, inputs) -> None:
    failures: list[object] = []

    def hammer(value: int) -> None:
        try:
            with triton.InferenceServerClient(address) as client:
                for _ in range(50):
                    answer = client.infer("adder", [inputs["x"](np.full((1, 4), value))])
                    assert (answer.as_numpy("y") == value + 2).all()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_large_requests_on_a_stream(address, inputs) -> None:
    answers: queue.Queue = queue.Queue()
    values = np.zeros((1_000_000, 4), np.float32)  # 16 MB: no more than two are under way.
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(6):
            values[0] = number
            made = inputs["tensor"]("x", values, "FP32")
            client.async_stream_infer("free", [made], request_id=str(number))
        for number in range(6):
            result, error = answers.get(timeout=60)
            assert error is None
            assert result.as_numpy("y")[0, 0] == number + 1
        client.stop_stream()
