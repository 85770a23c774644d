"""Tiny models, bundles made of them, and a manager that says what the test wants."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.bundle.v1 import bundle_pb2
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc
from pollard.models.v1 import model_service_pb2 as models_pb
from pollard.models.v1 import model_service_pb2_grpc as models_grpc
from pollard.runtime.bundle import MANIFEST, SIGNATURE, Bundle, write_bundle
from pollard.runtime.sessions import Session
from pollard.services.inference.main import InferenceServer, build_server
from pollard.services.inference.settings import InferenceSettings

WIDTH = 4

MakeBundle = Callable[..., Bundle]


def adder(constant: float, *, width: int = WIDTH, weights: int = 0) -> bytes:
    """An ONNX model that adds `constant` to its input `x` [n, width], giving `y`.

    `weights` numbers are carried along, to make the file larger.
    """
    initializers = [numpy_helper.from_array(np.float32([constant]), "c")]
    nodes = [helper.make_node("Add", ["x", "c"], ["y"])]
    if weights:
        initializers.append(numpy_helper.from_array(np.zeros(weights, np.float32), "ballast"))
        nodes = [
            helper.make_node("ReduceSum", ["ballast"], ["zero"], keepdims=0),
            helper.make_node("Add", ["x", "c"], ["sum"]),
            helper.make_node("Add", ["sum", "zero"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "adder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        initializers,
    )
    return serialized(graph)


def serialized(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name.replace("__", "/"): array for name, array in arrays.items()})
    return buffer.getvalue()


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Returns a function that writes a bundle of an adder, or of the parts given."""
    count = 0

    def make(
        constant: float = 1.0,
        *,
        model: bytes | None = None,
        inputs: list[bundle_pb2.TensorSpec] | None = None,
        outputs: list[bundle_pb2.TensorSpec] | None = None,
        golden: bytes | None = None,
        memory_bytes: int = 0,
        max_batch_size: int = 8,
        cpu_features: tuple[str, ...] = (),
        width: int = WIDTH,
        weights: int = 0,
    ) -> Bundle:
        nonlocal count
        count += 1
        tensor = bundle_pb2.TensorSpec(
            data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, width], layout="NC"
        )
        x, y = bundle_pb2.TensorSpec(), bundle_pb2.TensorSpec()
        x.CopyFrom(tensor)
        y.CopyFrom(tensor)
        x.name, y.name = "x", "y"
        plain = model is None
        files = {
            "cpu-fp32/model.onnx": model or adder(constant, width=width, weights=weights),
            "labels.txt": b"a\nb\nc\nd\n",
        }
        if golden is None and plain:
            values = np.arange(2 * width, dtype=np.float32).reshape(2, width)
            golden = npz(input__x=values, output__y=values + np.float32(constant))
        if golden:
            files["cpu-fp32/golden.npz"] = golden
        manifest = bundle_pb2.Manifest(
            schema_version=1,
            name="adder",
            task=bundle_pb2.TASK_RAW,
            variants=[
                bundle_pb2.Variant(
                    name="cpu-fp32",
                    target="cpu-fp32",
                    model_file="cpu-fp32/model.onnx",
                    golden_file="cpu-fp32/golden.npz" if golden else "",
                    golden_tolerance=bundle_pb2.Tolerance(relative=1e-5, absolute=1e-5),
                    requirements=bundle_pb2.Requirements(
                        memory_bytes=memory_bytes, cpu_features=cpu_features
                    ),
                    max_batch_size=max_batch_size,
                )
            ],
            inputs=inputs or [x],
            outputs=outputs or [y],
            postprocess=bundle_pb2.Postprocess(labels_file="labels.txt"),
        )
        return write_bundle(tmp_path / f"bundle-{count}", manifest, files)

    return make


class Manager(fleet_grpc.FleetServiceServicer, models_grpc.ModelServiceServicer):
    """The manager's side of the two calls that a server makes, told by the test what to want."""

    def __init__(self) -> None:
        self.bundles: dict[str, Bundle] = {}
        self.damage: dict[str, Callable[[str, bytes], bytes]] = {}
        self.ended: dict[str, grpc.StatusCode] = {}
        """How downloads of a bundle end, by digest."""
        self.downloads: list[tuple[str, tuple[str, ...]]] = []
        self.access: fleet_pb.AccessList | None = None
        """Sent to each server as it comes."""
        self.version = 0
        self.models: dict[str, fleet_pb.DesiredModel] = {}
        self.hellos: list[fleet_pb.Hello] = []
        self.reports: list[fleet_pb.Report] = []
        self.answers: asyncio.Queue[fleet_pb.SyncRequest] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self._streams: list[asyncio.Queue[fleet_pb.SyncResponse]] = []
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = grpc.aio.server()
        fleet_grpc.add_FleetServiceServicer_to_server(self, self._server)
        models_grpc.add_ModelServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def want(
        self, model: str, revisions: dict[int, Bundle], routes: dict[str, dict[int, int]]
    ) -> None:
        """Put a model into the desired state; nothing is sent before `send`."""
        for bundle in revisions.values():
            self.bundles[bundle.digest] = bundle
        self.models[model] = fleet_pb.DesiredModel(
            model=model,
            revisions=[
                fleet_pb.DesiredRevision(
                    revision=number, bundle_sha256=bundle.digest, size_bytes=bundle.size_bytes
                )
                for number, bundle in revisions.items()
            ],
            routes=[
                fleet_pb.Route(
                    alias=alias,
                    targets=[
                        fleet_pb.WeightedRevision(revision=number, weight=weight)
                        for number, weight in targets.items()
                    ],
                )
                for alias, targets in routes.items()
            ],
        )

    def send(self) -> int:
        """Send the desired state to everybody; returns its version."""
        self.version += 1
        for stream in self._streams:
            stream.put_nowait(self._response())
        return self.version

    async def answer(self) -> fleet_pb.SyncRequest:
        async with asyncio.timeout(20):
            return await self.answers.get()

    async def apply(self) -> fleet_pb.SyncRequest:
        """Send the desired state and return the server's answer to it."""
        version = self.send()
        while True:
            answer = await self.answer()
            named = answer.ack if answer.HasField("ack") else answer.nack
            if named.version == version:
                return answer

    def _response(self) -> fleet_pb.SyncResponse:
        return fleet_pb.SyncResponse(
            desired_state=fleet_pb.DesiredState(
                version=self.version, nonce=str(self.version), models=self.models.values()
            )
        )

    async def Sync(self, requests, context):
        stream: asyncio.Queue[fleet_pb.SyncResponse] = asyncio.Queue()
        hello = await anext(aiter(requests))
        self.hellos.append(hello.hello)
        if self.access is not None:
            stream.put_nowait(fleet_pb.SyncResponse(access=self.access))
        if self.version:
            stream.put_nowait(self._response())
        self._streams.append(stream)

        async def hear() -> None:
            async for request in requests:
                if request.HasField("report"):
                    self.reports.append(request.report)
                else:
                    self.answers.put_nowait(request)

        hearing = asyncio.create_task(hear())
        try:
            while True:
                yield await stream.get()
        finally:
            self._streams.remove(stream)
            hearing.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await hearing

    async def DownloadBundle(self, request, context):
        self.downloads.append((request.bundle_sha256, tuple(request.paths)))
        await self.gate.wait()
        if request.bundle_sha256 in self.ended:
            await context.abort(self.ended[request.bundle_sha256], "for now")
        bundle = self.bundles.get(request.bundle_sha256)
        if bundle is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such bundle")
        names = [MANIFEST, *(file.path for file in bundle.manifest.files)]
        if (bundle.path / SIGNATURE).exists():
            names.append(SIGNATURE)
        if request.paths:
            if set(request.paths) - set(names):
                await context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
            names = [MANIFEST, *(path for path in request.paths if path != MANIFEST)]
        for name in names:
            data = (bundle.path / name).read_bytes()
            if bundle.digest in self.damage:
                data = self.damage[bundle.digest](name, data)
            for offset in range(0, max(len(data), 1), 4096):
                yield models_pb.DownloadBundleResponse(
                    path=name,
                    offset=offset,
                    data=data[offset : offset + 4096],
                    total_bytes=len(data),
                )


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    manager = Manager()
    await manager.start()
    yield manager
    await manager.stop()


StartServer = Callable[..., Awaitable[InferenceServer]]


@pytest.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    """Returns a function that starts a server; all of them are stopped at the end."""
    servers: list[InferenceServer] = []

    async def start(manager: str = "", **settings: object) -> InferenceServer:
        given = {
            "port": 0,
            "manager": manager,
            "cache_dir": tmp_path / "cache",
            "memory_headroom_bytes": 0,
            "measure": False,
            **settings,
        }
        server = build_server(InferenceSettings.load(given))
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.stop(1.0)


@pytest.fixture
async def server(
    request: pytest.FixtureRequest,
    manager: Manager,
    start_server: StartServer,
    make_bundle: MakeBundle,
) -> InferenceServer:
    """A server that serves revision 1 (adds 1) of "adder" as production.

    Requests go through the workers, as those of all but the smallest models do, unless the test
    gives `inline_microseconds` by indirect parametrization.
    """
    inline = getattr(request, "param", 0.0)
    manager.want("adder", {1: make_bundle(1.0)}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, inline_microseconds=inline)
    answer = await manager.answer()
    assert answer.HasField("ack"), answer
    return server


@pytest.fixture
async def stub(server: InferenceServer) -> AsyncIterator[pb_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def tensor_request() -> Callable[..., pb.ModelInferRequest]:
    """Returns a function that makes a request to "adder"."""

    def make(values: object = None, **fields: object) -> pb.ModelInferRequest:
        array = np.zeros((1, WIDTH), np.float32) if values is None else np.float32(values)
        request = pb.ModelInferRequest(model_name="adder", **fields)
        request.inputs.add(name="x", datatype="FP32", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
        return request

    return make


class Watched:
    """A real session whose runs the test can see and hold up."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.batches: list[int] = []
        """Rows of each run that has begun."""
        self.gate = threading.Event()
        """While it is not set, runs wait."""
        self.gate.set()

    def run(self, feeds: dict, outputs: Sequence[str] | None = None) -> dict:
        self.batches.append(feeds["x"].shape[0])
        self.gate.wait(60)
        if (feeds["x"] < 0).any():
            raise ValueError("negative\nmore")
        return self.session.run(feeds, outputs)

    def __getattr__(self, name: str) -> object:
        return getattr(self.session, name)


@pytest.fixture
def watch() -> type[Watched]:
    """What makes a session of which the test sees the runs, and which it can hold up."""
    return Watched
