"""Tensors in shared memory, through Triton's clients."""

from __future__ import annotations

import os
import queue
import time
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor


def refused(call, *arguments: object, **options: object) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments, **options)
    return caught.value.status().removeprefix("StatusCode."), caught.value.message()


@pytest.fixture
def region(client) -> Iterator[tuple[str, object]]:
    """A region of 64 bytes, registered; its name, which is its key too, and its handle."""
    key = f"pollard-test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region(key, f"/{key}", 64)
    client.register_system_shared_memory(key, f"/{key}", 64)
    yield key, handle
    client.unregister_system_shared_memory(key)
    shm.destroy_shared_memory_region(handle)


def in_region(name: str, size: int = 16, offset: int = 0, shape=(1, 4)) -> triton.InferInput:
    made = triton.InferInput("x", list(shape), "FP32")
    made.set_shared_memory(name, size, offset)
    return made


def out_region(name: str, size: int = 16, offset: int = 0) -> triton.InferRequestedOutput:
    made = triton.InferRequestedOutput("y")
    made.set_shared_memory(name, size, offset)
    return made


async def test_inputs_and_outputs(infer, region) -> None:
    name, handle = region
    shm.set_shared_memory_region(handle, [np.float32([[1, 2, 3, 4]])], offset=16)
    result = await infer(
        model_name="adder", inputs=[in_region(name, 16, 16)], outputs=[out_region(name, 20, 32)]
    )
    response = result.get_response()
    assert list(response.raw_output_contents) == [b""]
    assert response.outputs[0].parameters["shared_memory_region"].string_param == name
    assert response.outputs[0].parameters["shared_memory_byte_size"].int64_param == 16
    got = shm.get_contents_as_numpy(handle, np.float32, [1, 4], 32)
    assert got.tolist() == [[3, 4, 5, 6]]


async def test_one_input_there_and_one_in_the_message(infer, inputs, region) -> None:
    name, handle = region
    shm.set_shared_memory_region(handle, [np.int32([[5, 6]])])
    there = triton.InferInput("b", [1, 2], "INT32")
    there.set_shared_memory(name, 8)
    here = inputs["tensor"]("a", np.float32([[1, 2]]), "FP32")
    for both in ([there, here], [here, there]):
        result = await infer(model_name="pair", inputs=both)
        assert result.as_numpy("sum").tolist() == [[6, 8]]


async def test_texts(infer, region) -> None:
    name, handle = region
    data = serialize_byte_tensor(np.array([["one", "two"]], np.object_))
    shm.set_shared_memory_region(handle, [data])
    made = triton.InferInput("x", [1, 2], "BYTES")
    made.set_shared_memory(name, 14)
    result = await infer(model_name="echo_bytes", inputs=[made])
    assert result.as_numpy("y").tolist() == [[b"one", b"two"]]
    # The region may be larger than the texts; the rest is not theirs.
    made.set_shared_memory(name, 13)
    with pytest.raises(InferenceServerException, match="incomplete string data"):
        await infer(model_name="echo_bytes", inputs=[made])


BIG = 2**62


@pytest.mark.parametrize(
    ("inputs_of", "outputs_of", "status", "words"),
    [
        (lambda n: in_region("no"), None, "NOT_FOUND", "Unable to find system shared memory"),
        (None, lambda n: out_region("no"), "NOT_FOUND", "Unable to find system shared memory"),
        (lambda n: in_region(n, 16, 49), None, "INVALID_ARGUMENT", "Invalid offset + byte size"),
        (lambda n: in_region(n, 16, 65), None, "INVALID_ARGUMENT", "Invalid offset for shared"),
        (lambda n: in_region(n, 16, -1), None, "INVALID_ARGUMENT", "Invalid offset for shared"),
        (lambda n: in_region(n, 16, BIG), None, "INVALID_ARGUMENT", "Invalid offset for shared"),
        (lambda n: in_region(n, 15), None, "INVALID_ARGUMENT", "Expected 16, got 15"),
        (lambda n: in_region(n, BIG), None, "INVALID_ARGUMENT", "Expected 16, got"),
        (lambda n: in_region(n, -16), None, "INVALID_ARGUMENT", "Expected 16, got -16"),
        (None, lambda n: out_region(n, 65), "INVALID_ARGUMENT", "Invalid offset + byte size"),
        (None, lambda n: out_region(n, BIG), "INVALID_ARGUMENT", "Invalid offset + byte size"),
        (None, lambda n: out_region(n, -1), "INVALID_ARGUMENT", "Invalid offset + byte size"),
        (None, lambda n: out_region(n, 15), "INTERNAL", "should be at least 16 bytes to hold"),
    ],
)
async def test_what_is_not_within_a_region(
    infer, inputs, region, inputs_of, outputs_of, status, words
) -> None:
    name, _ = region
    with pytest.raises(InferenceServerException) as caught:
        await infer(
            model_name="adder",
            inputs=[inputs_of(name) if inputs_of else inputs["x"]()],
            outputs=[outputs_of(name)] if outputs_of else None,
        )
    assert words in caught.value.message()
    if caught.value.has_status:
        assert caught.value.status() == f"StatusCode.{status}"


async def test_classes_do_not_go_to_shared_memory(infer, inputs, region) -> None:
    wanted = out_region(region[0])
    wanted._output.parameters["classification"].int64_param = 1
    with pytest.raises(InferenceServerException, match="can't be used with classification"):
        await infer(model_name="adder", inputs=[inputs["x"]()], outputs=[wanted])


def test_registering(client, region) -> None:
    name, _ = region
    status = client.get_system_shared_memory_status(name).regions[name]
    assert (status.name, status.key, status.offset, status.byte_size) == (name, f"/{name}", 0, 64)
    assert name in client.get_system_shared_memory_status().regions
    register = client.register_system_shared_memory
    code, words = refused(register, name, f"/{name}", 64)
    assert (code, "already in manager" in words) == ("ALREADY_EXISTS", True)
    code, words = refused(register, "other", f"/no-{name}", 64)
    assert (code, "Unable to open shared memory region" in words) == ("INTERNAL", True)
    for size, offset in ((65, 0), (1, 64), (0, 0), (2**63, 0), (1, 2**63)):
        assert refused(register, "other", f"/{name}", size, offset)[0] == "INVALID_ARGUMENT"
    for key in ("", "/", "..", "/../etc/passwd", "a/b", "a\0b", "x" * 5000):
        assert refused(register, "other", key, 1)[0] == "INTERNAL"
    assert refused(client.get_system_shared_memory_status, "no")[0] == "NOT_FOUND"
    client.unregister_system_shared_memory("no")


def test_objects_that_go_or_shrink(client, inputs, region) -> None:
    name, handle = region
    path = f"/dev/shm/{name}"  # noqa: S108 - that is where they are
    os.truncate(path, 8)
    status, words = refused(client.infer, "adder", [in_region(name)])
    assert (status, "has become smaller" in words) == ("INTERNAL", True)
    status, words = refused(client.infer, "adder", [inputs["x"]()], outputs=[out_region(name)])
    assert (status, "has become smaller" in words) == ("INTERNAL", True)
    assert os.path.getsize(path) == 8
    os.truncate(path, 64)
    os.rename(path, path + "-gone")
    # Its name is gone, the memory is not.
    client.infer("adder", [in_region(name)])
    os.rename(path + "-gone", path)
    shm.get_contents_as_numpy(handle, np.uint8, [1])


def test_forgotten_while_in_use(client, address, inputs, region) -> None:
    name, handle = region
    done: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(address) as other:
        for _ in range(10):
            other.async_infer(
                "slower",
                [inputs["x"]([[1, 2, 3, 4]])],
                lambda result, error: done.put(error),
                outputs=[out_region(name)],
            )
            time.sleep(0.05)
            client.unregister_system_shared_memory(name)
            assert refused(client.infer, "adder", [in_region(name)])[0] == "NOT_FOUND"
            error = done.get(timeout=30)
            if error is None:
                break
            # It had not reached the server yet.
            client.register_system_shared_memory(name, f"/{name}", 64)
        assert error is None
    assert shm.get_contents_as_numpy(handle, np.float32, [4]).tolist() == [1, 2, 3, 4]


def test_off_unless_asked_for(serve, zoo, tmp_path) -> None:
    zoo["put"](tmp_path, "adder", {1: zoo["adder"](1)})
    with serve(tmp_path) as address, triton.InferenceServerClient(address) as client:
        assert "system_shared_memory" not in client.get_server_metadata().extensions
        for call, arguments in (
            (client.register_system_shared_memory, ("r", "/r", 1)),
            (client.get_system_shared_memory_status, ()),
            (client.unregister_system_shared_memory, ()),
            (client.get_cuda_shared_memory_status, ()),
            (client.infer, ("adder", [in_region("r")])),
        ):
            assert refused(call, *arguments)[0] == "UNIMPLEMENTED"
