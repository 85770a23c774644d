"""Every failure of a request arrives as the class of its status, with what the server said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from pollard.client import (
    DeadlineExceeded,
    Internal,
    InvalidAnswer,
    NotFound,
    RequestFailed,
    Unavailable,
    Unknown,
)
from pollard.client.cli import _main
from pollard.client.errors import _BY_CODE
from pollard.inference import grpc_service_pb2

CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_each_status_has_its_class(
    code: grpc.StatusCode, runner: Any, address: str, scripted: Any, abort_with: Callable[..., None]
) -> None:
    scripted.on("GetModel", lambda request, context: abort_with(context, code, "said so"))
    with pytest.raises(RequestFailed) as caught:
        runner.call("models", address, "model", "digits", client={"timeout": 5.0})
    assert type(caught.value) is _BY_CODE[code]
    assert caught.value.code is code
    assert str(caught.value) == "said so"
    assert caught.value.address == address
    assert caught.value.method == "/pollard.models.v1.ModelService/GetModel"


def test_reason_and_metadata_come_from_error_info(
    runner: Any, address: str, scripted: Any, abort_with: Callable[..., None]
) -> None:
    scripted.on(
        "Predict",
        lambda request, context: abort_with(
            context, grpc.StatusCode.NOT_FOUND, "no model 'cats'", "MODEL_NOT_FOUND", model="cats"
        ),
    )
    with pytest.raises(NotFound) as caught:
        runner.call("vision", address, "predict", b"image", "cats")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert caught.value.details.domain == "pollard.ai"
    assert dict(caught.value.metadata) == {"model": "cats"}


def fail_as(code: grpc.StatusCode) -> Callable[[Any, grpc.ServicerContext], None]:
    """Fail a request that has an id."""

    def answer(request: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("x-request-id", "4f2a"),))
        context.abort(code, "said so")

    return answer


def test_a_failure_has_the_id_of_its_request(runner: Any, address: str, scripted: Any) -> None:
    scripted.on("GetModel", fail_as(grpc.StatusCode.INTERNAL))
    with pytest.raises(Internal) as caught:
        runner.call("models", address, "model", "digits")
    assert caught.value.request_id == "4f2a"


@pytest.mark.parametrize(
    ("code", "said"), [(grpc.StatusCode.INTERNAL, True), (grpc.StatusCode.NOT_FOUND, False)]
)
def test_commands_say_the_id_where_only_the_servers_log_helps(
    code: grpc.StatusCode,
    said: bool,
    address: str,
    scripted: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted.on("GetModel", fail_as(code))
    assert _main.run(["models", "show", "digits", "--server", address]) == 1
    shown = capsys.readouterr().err
    assert "said so" in shown
    assert ("4f2a" in shown) is said


def test_a_server_that_raises_is_unknown(runner: Any, address: str, scripted: Any) -> None:
    def broken(request: Any, context: Any) -> None:
        raise ZeroDivisionError("oops")

    scripted.on("GetModel", broken)
    with pytest.raises(Unknown):
        runner.call("models", address, "model", "digits")


def test_no_server_is_unavailable(runner: Any) -> None:
    with pytest.raises(Unavailable) as caught:
        runner.call("models", "127.0.0.1:1", "models")
    assert caught.value.address == "127.0.0.1:1"


def test_a_server_that_does_not_answer_meets_the_deadline(
    runner: Any, address: str, scripted: Any
) -> None:
    import threading

    release = threading.Event()
    scripted.on("ModelInfer", lambda request, context: release.wait(20) and None)
    try:
        with pytest.raises(DeadlineExceeded):
            runner.call(
                "inference", address, "infer", "m", {"x": np.zeros((1, 2), np.uint8)}, timeout=0.2
            )
    finally:
        release.set()


def test_an_answer_whose_bytes_do_not_fit_is_an_invalid_answer(
    runner: Any, address: str, scripted: Any
) -> None:
    answer = grpc_service_pb2.ModelInferResponse(model_name="m", model_version="1")
    answer.outputs.add(name="y", datatype="FP32", shape=[1, 3])
    answer.raw_output_contents.append(b"\0" * 8)
    scripted.on("ModelInfer", lambda request, context: answer)
    with pytest.raises(InvalidAnswer, match="8 bytes"):
        runner.call("inference", address, "infer", "m", {"x": np.zeros((1, 2), np.uint8)})
