"""Pictures, a manager that says what the test wants, and real servers around it."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc
from pollard.models.v1 import model_service_pb2 as models_pb
from pollard.models.v1 import model_service_pb2_grpc as models_grpc
from pollard.preprocess.v1 import preprocess_service_pb2_grpc as preprocess_grpc
from pollard.runtime.bundle import MANIFEST, Bundle
from pollard.runtime.postprocess import ScoredClass, classify
from pollard.runtime.transforms import Pipeline
from pollard.services.inference import main as inference_main
from pollard.services.inference.settings import InferenceSettings
from pollard.services.preprocess import main as preprocess_main
from pollard.services.preprocess.settings import PreprocessSettings
from pollard.vision.v1 import vision_service_pb2_grpc as vision_grpc

INFERENCE = fleet_pb.SERVER_KIND_INFERENCE
PREPROCESS = fleet_pb.SERVER_KIND_PREPROCESS


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., bytes]:
    """Returns a function that draws a picture, another one for each seed, as PNG or JPEG."""

    def make(seed: int = 0, *, width: int = 60, height: int = 40, kind: str = "PNG") -> bytes:
        blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
        image = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        file = io.BytesIO()
        image.save(file, kind, **({"compress_level": 1} if kind == "PNG" else {}))
        return file.getvalue()

    return make


@pytest.fixture(scope="session")
def slow_picture(make_picture) -> bytes:
    """36 megapixels: a worker is busy with it for a good part of a second."""
    return make_picture(99, width=6000, height=6000)


@pytest.fixture(scope="session")
def offline() -> Callable[..., list[ScoredClass]]:
    """Returns a function that answers for an image by a bundle, without any server."""

    def answer(bundle: Bundle, content: bytes, top_k: int = 0) -> list[ScoredClass]:
        tensor = Pipeline(bundle.manifest.preprocess).apply(content).array[None]
        session = onnxruntime.InferenceSession(
            bundle.model_path(bundle.manifest.variants[0]), providers=["CPUExecutionProvider"]
        )
        outputs = {"scores": session.run(["scores"], {"image": tensor})[0]}
        return classify(outputs, bundle.manifest, bundle.labels, top_k)

    return answer


class Manager(fleet_grpc.FleetServiceServicer, models_grpc.ModelServiceServicer):
    """The manager's side of the calls that servers make; each kind of server has its own state."""

    def __init__(self) -> None:
        self.bundles: dict[str, Bundle] = {}
        self.downloads: list[str] = []
        self.states = {kind: fleet_pb.DesiredState() for kind in (INFERENCE, PREPROCESS)}
        self.version = 0
        self.acks: dict[str, int] = {}
        self.nacks: dict[str, fleet_pb.Nack] = {}
        self.reports: dict[str, fleet_pb.Report] = {}
        self._heard = asyncio.Condition()
        self._streams: dict[str, tuple[int, asyncio.Queue[fleet_pb.SyncResponse]]] = {}
        self._server: grpc.aio.Server | None = None
        self.address = ""

    async def start(self) -> None:
        self._server = grpc.aio.server()
        fleet_grpc.add_FleetServiceServicer_to_server(self, self._server)
        models_grpc.add_ModelServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def set(
        self,
        kind: int,
        revisions: dict[int, Bundle],
        routes: dict[str, dict[int, int]],
        *,
        model: str = "linear",
        endpoints: tuple[str, ...] | None = None,
        shadow: fleet_pb.Shadow | None = None,
    ) -> int:
        """Send all servers of a kind a new state for one model; returns its version."""
        state = fleet_pb.DesiredState()
        state.CopyFrom(self.states[kind])
        self.version += 1
        state.version = self.version
        state.nonce = str(self.version)
        others = [entry for entry in state.models if entry.model != model]
        del state.models[:]
        state.models.extend(others)
        entry = state.models.add(model=model)
        for number, bundle in revisions.items():
            self.bundles[bundle.digest] = bundle
            entry.revisions.add(
                revision=number, bundle_sha256=bundle.digest, size_bytes=bundle.size_bytes
            )
        for alias, targets in routes.items():
            route = entry.routes.add(alias=alias)
            for number, weight in targets.items():
                route.targets.add(revision=number, weight=weight)
            if shadow is not None:
                route.shadow.CopyFrom(shadow)
        if endpoints is not None:
            del state.inference_endpoints[:]
            for address in endpoints:
                state.inference_endpoints.add(server_id=address, address=address)
        self.states[kind] = state
        for served_kind, stream in self._streams.values():
            if served_kind == kind:
                stream.put_nowait(fleet_pb.SyncResponse(desired_state=state))
        return self.version

    async def acknowledged(self, version: int, *servers: str) -> None:
        """Wait until the servers run that version or a later one."""
        async with asyncio.timeout(20), self._heard:
            await self._heard.wait_for(
                lambda: all(self.acks.get(server, 0) >= version for server in servers)
            )

    async def refused(self, version: int, server: str) -> fleet_pb.Nack:
        """Wait until the server has refused that version; returns its words."""
        async with asyncio.timeout(20), self._heard:
            await self._heard.wait_for(
                lambda: server in self.nacks and self.nacks[server].version >= version
            )
        return self.nacks[server]

    async def Sync(self, requests, context):
        hello = (await anext(aiter(requests))).hello
        stream: asyncio.Queue[fleet_pb.SyncResponse] = asyncio.Queue()
        if self.states[hello.kind].version:
            stream.put_nowait(fleet_pb.SyncResponse(desired_state=self.states[hello.kind]))
        self._streams[hello.server_id] = (hello.kind, stream)
        hearing = asyncio.create_task(self._hear(hello.server_id, requests))
        try:
            while True:
                yield await stream.get()
        finally:
            del self._streams[hello.server_id]
            hearing.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await hearing

    async def _hear(self, server: str, requests) -> None:
        async for request in requests:
            async with self._heard:
                if request.HasField("ack"):
                    self.acks[server] = request.ack.version
                elif request.HasField("nack"):
                    self.nacks[server] = request.nack
                else:
                    self.reports[server] = request.report
                self._heard.notify_all()

    async def DownloadBundle(self, request, context):
        bundle = self.bundles[request.bundle_sha256]
        names = request.paths or [MANIFEST, *(file.path for file in bundle.manifest.files)]
        if MANIFEST not in names:
            names = [MANIFEST, *names]
        for name in names:
            self.downloads.append(name)
            data = (bundle.path / name).read_bytes()
            yield models_pb.DownloadBundleResponse(
                path=name, offset=0, data=data, total_bytes=len(data)
            )


@pytest.fixture
async def manager() -> AsyncIterator[Manager]:
    manager = Manager()
    await manager.start()
    yield manager
    await manager.stop()


@pytest.fixture
async def start_inference(manager, tmp_path: Path):
    """Returns a function that starts an inference server by its id."""
    servers = []

    async def start(server_id: str = "inference-1", **settings: object):
        server = inference_main.build_server(
            InferenceSettings.load(
                {
                    "port": 0,
                    "manager": manager.address,
                    "server_id": server_id,
                    "cache_dir": tmp_path / server_id,
                    "memory_headroom_bytes": 0,
                    **settings,
                }
            )
        )
        servers.append(server)
        await server.start()
        return server

    yield start
    for server in servers:
        await server.stop(1.0)


@dataclass
class Replica:
    """A preprocess server with clients."""

    server: preprocess_main.PreprocessServer
    channel: grpc.aio.Channel
    vision: vision_grpc.VisionServiceStub = field(init=False)
    preprocess: preprocess_grpc.PreprocessServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.vision = vision_grpc.VisionServiceStub(self.channel)
        self.preprocess = preprocess_grpc.PreprocessServiceStub(self.channel)


StartPreprocess = Callable[..., Awaitable[Replica]]


@pytest.fixture
async def start_preprocess(manager, tmp_path: Path) -> AsyncIterator[StartPreprocess]:
    """Returns a function that starts a preprocess server by its id."""
    replicas: list[Replica] = []

    async def start(server_id: str = "preprocess-1", **settings: object) -> Replica:
        server = preprocess_main.build_server(
            PreprocessSettings.load(
                {
                    "port": 0,
                    "manager": manager.address,
                    "server_id": server_id,
                    "cache_dir": tmp_path / server_id,
                    "decode_workers": 1,
                    **settings,
                }
            )
        )
        try:
            await server.start()
        except BaseException:
            await server.stop(0.0)
            raise
        channel = grpc.aio.insecure_channel(
            server.address, options=[("grpc.max_send_message_length", 64 * 1024**2)]
        )
        replicas.append(Replica(server, channel))
        return replicas[-1]

    yield start
    for replica in replicas:
        await replica.channel.close()
        await replica.server.stop(1.0)


@pytest.fixture
async def suite(manager, make_bundle, start_inference, start_preprocess):
    """One inference and one preprocess server that serve revision 1 of "linear"."""
    bundle = make_bundle(size=8, channels=3)
    wanted = manager.set(INFERENCE, {1: bundle}, {"production": {1: 1}})
    inference = await start_inference()
    await manager.acknowledged(wanted, "inference-1")
    manager.set(PREPROCESS, {1: bundle}, {"production": {1: 1}}, endpoints=(inference.address,))
    replica = await start_preprocess()
    await manager.acknowledged(manager.version, "preprocess-1")
    replica.bundle = bundle
    replica.inference = inference
    return replica
