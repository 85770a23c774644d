"""A real gRPC server in this process whose answers a test decides, for what real services cannot
be made to do on demand."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, ClassVar

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from pollard.client import (
    AsyncInferenceClient,
    AsyncModelsClient,
    AsyncVisionClient,
    InferenceClient,
    ModelsClient,
    VisionClient,
)
from pollard.inference import grpc_service_pb2_grpc
from pollard.models.v1 import fleet_service_pb2_grpc, model_service_pb2_grpc
from pollard.preprocess.v1 import preprocess_service_pb2_grpc
from pollard.vision.v1 import vision_service_pb2_grpc

Handler = Callable[[Any, grpc.ServicerContext], Any]


class Scripted:
    """A servicer whose methods are set by the test: `scripted.on("Predict", function)`."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.calls: list[str] = []
        self.lock = threading.Lock()

    def on(self, method: str, handler: Handler) -> None:
        self.handlers[method] = handler

    def answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        with self.lock:
            self.calls.append(method)
        return self.handlers[method](request, context)


def _servicer(base: type, scripted: Scripted) -> Any:
    def bound(name: str) -> Handler:
        return lambda self, request, context: scripted.answer(name, request, context)

    methods = {name: bound(name) for name, _ in inspect.getmembers(base) if name[0].isupper()}
    return type("Servicer", (base,), methods)()


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def address(scripted: Scripted) -> Iterator[str]:
    """Address of a server that answers as `scripted` says."""
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    for module, name in (
        (model_service_pb2_grpc, "ModelService"),
        (fleet_service_pb2_grpc, "FleetService"),
        (vision_service_pb2_grpc, "VisionService"),
        (preprocess_service_pb2_grpc, "PreprocessService"),
        (grpc_service_pb2_grpc, "GRPCInferenceService"),
    ):
        servicer = _servicer(getattr(module, f"{name}Servicer"), scripted)
        getattr(module, f"add_{name}Servicer_to_server")(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def abort(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    reason: str = "",
    **metadata: str,
) -> None:
    """Fail a request the way Pollard's services do."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if reason:
        detail = any_pb2.Any()
        detail.Pack(
            error_details_pb2.ErrorInfo(reason=reason, domain="pollard.ai", metadata=metadata)
        )
        status.details.append(detail)
    context.abort_with_status(rpc_status.to_status(status))


@pytest.fixture
def abort_with() -> Callable[..., None]:
    return abort


class Runner:
    """Calls the sync or the asyncio client of one kind, so that one test covers both."""

    kinds: ClassVar[dict[tuple[str, bool], type]] = {
        ("models", False): ModelsClient,
        ("models", True): AsyncModelsClient,
        ("vision", False): VisionClient,
        ("vision", True): AsyncVisionClient,
        ("inference", False): InferenceClient,
        ("inference", True): AsyncInferenceClient,
    }

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous

    def call(
        self,
        kind: str,
        address: str,
        method: str,
        *args: Any,
        client: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        cls = self.kinds[kind, self.asynchronous]
        if not self.asynchronous:
            with cls(address, **(client or {})) as made:
                return getattr(made, method)(*args, **kwargs)

        async def run() -> Any:
            async with cls(address, **(client or {})) as made:
                return await getattr(made, method)(*args, **kwargs)

        return asyncio.run(run())


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """The sync clients, then the asyncio ones."""
    return Runner(request.param)
