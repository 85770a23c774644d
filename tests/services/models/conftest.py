"""A manager in the process, bundles to push, and servers that follow it over real streams."""

from __future__ import annotations

import asyncio
import hashlib
import io
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from google.rpc import error_details_pb2, status_pb2
from onnx import TensorProto, helper, numpy_helper

from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc
from pollard.models.v1 import model_service_pb2 as pb
from pollard.models.v1 import model_service_pb2_grpc as pb_grpc
from pollard.runtime.archive import pack
from pollard.runtime.bundle import Bundle, write_bundle
from pollard.services.common.bundle_source import BundleSource
from pollard.services.common.fleet_agent import Applied
from pollard.services.models.main import ModelsService, build_server
from pollard.services.models.settings import ModelsSettings
from pollard.services.models.store import DATABASE, Store

TIMEOUT = 30.0

ON_BOTH = {
    *("test_registry", "test_filters", "test_odd_names", "test_rollouts", "test_switch"),
    "test_uploads",
}
"""Modules whose tests run on SQLite and on PostgreSQL; the others on SQLite."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    if "backend" in metafunc.fixturenames and module in ON_BOTH:
        metafunc.parametrize("backend", ["sqlite", "postgresql"], indirect=True)


def graph(seed: int = 0, size: int = 4, classes: int = 3) -> bytes:
    """An ONNX classifier of uint8 [-1, size, size, 1]."""
    weights = np.random.default_rng(seed).normal(size=(size * size, classes))
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", size, size, 1])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", classes])],
            [numpy_helper.from_array(weights.astype(np.float32), "weights")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.checker.check_model(made)
    return made.SerializeToString()


def manifest(size: int = 4, classes: int = 3) -> bundle_pb2.Manifest:
    """A manifest that fits `graph`."""
    return bundle_pb2.Manifest(
        schema_version=1,
        name="tiny",
        task=bundle_pb2.TASK_CLASSIFICATION,
        inputs=[
            bundle_pb2.TensorSpec(
                name="image",
                data_type=bundle_pb2.DATA_TYPE_UINT8,
                shape=[-1, size, size, 1],
                layout="NHWC",
            )
        ],
        outputs=[
            bundle_pb2.TensorSpec(
                name="scores",
                data_type=bundle_pb2.DATA_TYPE_FP32,
                shape=[-1, classes],
                layout="NC",
            )
        ],
        variants=[
            bundle_pb2.Variant(name="cpu-fp32", target="cpu-fp32", model_file="cpu-fp32/model.onnx")
        ],
    )


@dataclass
class Bundles:
    """Makes bundles below a directory."""

    root: Path
    made: int = 0

    def make(
        self,
        seed: int = 0,
        *,
        size: int = 4,
        says: bundle_pb2.Manifest | None = None,
        model: bytes | None = None,
        **more: bytes,
    ) -> Bundle:
        self.made += 1
        files: dict[str, bytes | Path] = {"cpu-fp32/model.onnx": model or graph(seed, size)}
        files.update(more)
        return write_bundle(self.root / f"bundle-{self.made}", says or manifest(size), files)

    def tar(self, seed: int = 0, **how: Any) -> bytes:
        return packed(self.make(seed, **how))


def packed(bundle: Bundle) -> bytes:
    buffer = io.BytesIO()
    pack(bundle, buffer)
    return buffer.getvalue()


def info_of(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """The one ErrorInfo of an error."""
    trailing = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert len(status.details) == 1
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "pollard.ai"
    return info


class Client:
    """The stubs, and the few calls that every test makes."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(
            address, options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        self.models = pb_grpc.ModelServiceStub(self.channel)
        self.fleet = fleet_grpc.FleetServiceStub(self.channel)

    def header(self, tar: bytes, model: str = "m", **more: Any) -> pb.UploadHeader:
        more.setdefault("upload_id", str(uuid.uuid4()))
        more.setdefault("sha256", hashlib.sha256(tar).hexdigest())
        more.setdefault("total_bytes", len(tar))
        return pb.UploadHeader(parent=f"models/{model}", **more)

    async def send(
        self, header: pb.UploadHeader, tar: bytes, *, chunk: int = 1000
    ) -> pb.UploadBundleResponse:
        async def messages() -> AsyncIterator[pb.UploadBundleRequest]:
            yield pb.UploadBundleRequest(header=header)
            for start in range(header.write_offset, len(tar), chunk):
                yield pb.UploadBundleRequest(data=tar[start : start + chunk])

        while True:
            try:
                return await self.models.UploadBundle(messages(), timeout=TIMEOUT)
            except grpc.aio.AioRpcError as error:
                # What grpc's asyncio client says where it has lost the status that the call was
                # ended with while it was sending (grpc/grpc#36066).
                if error.details() != "Internal error from Core":
                    raise

    async def push(self, tar: bytes, model: str = "m", **more: Any) -> pb.UploadBundleResponse:
        return await self.send(self.header(tar, model, **more), tar)

    async def set_alias(
        self, revision: int, model: str = "m", alias: str = "production", **more: Any
    ) -> pb.Alias:
        request = pb.SetAliasRequest(
            name=f"models/{model}/aliases/{alias}", revision=revision, **more
        )
        return (await self.models.SetAlias(request, timeout=TIMEOUT)).alias

    async def alias(self, model: str = "m", alias: str = "production") -> pb.Alias:
        request = pb.GetAliasRequest(name=f"models/{model}/aliases/{alias}")
        return (await self.models.GetAlias(request, timeout=TIMEOUT)).alias

    async def alias_when(
        self, condition: Callable[[pb.Alias], bool], model: str = "m", alias: str = "production"
    ) -> pb.Alias:
        return await eventually(lambda: self.alias(model, alias), condition)

    async def download(self, **source: Any) -> dict[str, bytes]:
        found: dict[str, bytearray] = {}
        call = self.models.DownloadBundle(pb.DownloadBundleRequest(**source), timeout=TIMEOUT)
        async for piece in call:
            content = found.setdefault(piece.path, bytearray())
            assert piece.offset == len(content)
            content += piece.data
        return {path: bytes(content) for path, content in found.items()}

    async def server(self, server_id: str) -> fleet_pb.Server:
        """The server; an empty message when it is unknown."""
        answer = await self.fleet.ListServers(fleet_pb.ListServersRequest(), timeout=TIMEOUT)
        found = (s for s in answer.servers if s.name == f"servers/{server_id}")
        return next(found, fleet_pb.Server())

    async def close(self) -> None:
        await self.channel.close()


async def eventually(
    look: Callable[[], Awaitable[Any]], condition: Callable[[Any], bool], seconds: float = TIMEOUT
) -> Any:
    """What `look` gives once it satisfies `condition`."""
    found = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                found = await look()
                if condition(found):
                    return found
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never came about; at last: {found}") from None


@dataclass
class FollowingServer:
    """A server of the fleet as the manager sees it: a real Sync stream, and no models.

    `automatic`: load whatever is wanted and acknowledge it. Otherwise the test
    says what the server answers.
    """

    client: Client
    server_id: str
    kind: Any = fleet_pb.SERVER_KIND_INFERENCE
    automatic: bool = True
    refuses: set[tuple[str, int]] = field(default_factory=set)
    applied_version: int = 0
    address: str = ""
    states: list[fleet_pb.DesiredState] = field(default_factory=list)
    status: grpc.StatusCode | None = None

    def __post_init__(self) -> None:
        self._outbox: asyncio.Queue[fleet_pb.SyncRequest | None] = asyncio.Queue()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.details = ""

    async def open(self) -> FollowingServer:
        self.say(
            hello=fleet_pb.Hello(
                server_id=self.server_id,
                kind=self.kind,
                address=self.address or f"{self.server_id}:1",
                applied_version=self.applied_version,
            )
        )
        self._task = asyncio.create_task(self._follow())
        await self.state_when(lambda state: state.version > 0)
        return self

    def say(self, **message: Any) -> None:
        self._outbox.put_nowait(fleet_pb.SyncRequest(**message))

    def report(
        self, *entries: tuple[str, int, Any], digests: Mapping[tuple[str, int], str] | None = None
    ) -> None:
        """Say what runs; of which bundles, only where `digests` tells it."""
        told = digests or {}
        self.say(
            report=fleet_pb.Report(
                revisions=[
                    fleet_pb.RevisionStatus(
                        model=model,
                        revision=revision,
                        state=state,
                        error=status_pb2.Status(code=9, message=f"{self.server_id} cannot")
                        if state == fleet_pb.REVISION_STATE_FAILED
                        else None,
                        bundle_sha256=told.get((model, revision), ""),
                    )
                    for model, revision, state in entries
                ]
            )
        )

    def ack(self, state: fleet_pb.DesiredState) -> None:
        self.say(ack=fleet_pb.Ack(version=state.version, nonce=state.nonce))

    def nack(self, state: fleet_pb.DesiredState, why: str = "no") -> None:
        status = status_pb2.Status(code=9, message=why)
        self.say(nack=fleet_pb.Nack(version=state.version, nonce=state.nonce, status=status))

    async def _follow(self) -> None:
        async def messages() -> AsyncIterator[fleet_pb.SyncRequest]:
            while (message := await self._outbox.get()) is not None:
                yield message

        try:
            async for response in self.client.fleet.Sync(messages()):
                self.states.append(response.desired_state)
                self._arrived.set()
                if self.automatic:
                    self._apply(response.desired_state)
            self.status = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            self.status, self.details = error.code(), error.details() or ""
        finally:
            self._arrived.set()

    def _apply(self, state: fleet_pb.DesiredState) -> None:
        wanted = [(m.model, r.revision) for m in state.models for r in m.revisions]
        refused = [key for key in wanted if key in self.refuses]
        self.report(
            *(
                (
                    *key,
                    fleet_pb.REVISION_STATE_FAILED
                    if key in refused
                    else fleet_pb.REVISION_STATE_READY,
                )
                for key in wanted
            )
        )
        if refused:
            self.nack(state)
        else:
            self.ack(state)

    async def state_when(
        self, condition: Callable[[fleet_pb.DesiredState], bool]
    ) -> fleet_pb.DesiredState:
        """The first state received, earlier or later, that satisfies `condition`."""
        looked = 0
        async with asyncio.timeout(TIMEOUT):
            while True:
                for state in self.states[looked:]:
                    if condition(state):
                        return state
                looked = len(self.states)
                assert self._task is not None
                assert not self._task.done(), (self.status, self.details)
                self._arrived.clear()
                await self._arrived.wait()

    async def ended(self) -> grpc.StatusCode | None:
        assert self._task is not None
        async with asyncio.timeout(TIMEOUT):
            await self._task
        return self.status

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class Member:
    """A server that runs whatever it is told, and writes down every state."""

    def __init__(self) -> None:
        self.states: list[fleet_pb.DesiredState] = []

    async def apply(
        self, state: fleet_pb.DesiredState, bundles: BundleSource, hopeless: object = None
    ) -> Applied:
        await asyncio.sleep(0.02)
        kept = fleet_pb.DesiredState()
        kept.CopyFrom(state)
        self.states.append(kept)
        return Applied(running=kept)

    def statuses(self) -> list[fleet_pb.RevisionStatus]:
        return [
            fleet_pb.RevisionStatus(
                model=model.model,
                revision=revision.revision,
                state=fleet_pb.REVISION_STATE_READY,
            )
            for model in (self.states[-1].models if self.states else ())
            for revision in model.revisions
        ]


def revisions_of(state: fleet_pb.DesiredState, model: str = "m") -> list[int]:
    return [r.revision for m in state.models if m.model == model for r in m.revisions]


def route_of(
    state: fleet_pb.DesiredState, model: str = "m", alias: str = "production"
) -> int | None:
    for each in state.models:
        for route in each.routes:
            if (each.model, route.alias) == (model, alias):
                return int(route.targets[0].revision)
    return None


@dataclass
class Suite:
    """One manager with its client; restarts on the same store."""

    settings: ModelsSettings
    stack: AsyncExitStack
    service: ModelsService | None = None
    client: Client = None  # type: ignore[assignment]  # set by start

    async def start(self) -> None:
        self.service = build_server(self.settings)
        await self.service.start()
        self.client = Client(self.service.address)

    async def stop(self) -> None:
        if self.service is not None:
            await self.service.stop(0)
            self.service = None
        await self.client.close()

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    async def join(self, server_id: str, **how: Any) -> FollowingServer:
        server = FollowingServer(self.client, server_id, **how)
        self.stack.push_async_callback(server.close)
        return await server.open()


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path)


def fill(root: Path, database_url: str = "") -> Path:
    """Make a store with three revisions of `m`, the first of them in production."""

    async def work() -> None:
        settings = ModelsSettings(store=root / "store", port=0, database_url=database_url)
        suite = Suite(settings, AsyncExitStack())
        await suite.start()
        for seed in (1, 2, 3):
            await suite.client.push(Bundles(root / str(seed)).tar(seed))
        await suite.client.set_alias(1)
        await suite.client.alias_when(lambda alias: alias.state == pb.Alias.STATE_ACTIVE)
        await suite.stop()

    # In a thread, because the tests' own loop may be running.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work()).result()
    return root / "store"


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three revisions of `m`, the first of them in production; made once."""
    return fill(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def postgres_stock(tmp_path_factory: pytest.TempPathFactory, postgres: Any) -> tuple[Path, str]:
    """The same with its registry in a database, and the database's name; both to be copied."""
    name = postgres.new_database()
    return fill(tmp_path_factory.mktemp("postgres-stock"), postgres.url(name)), name


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The registry of a store that nothing was pushed to: migrated once, and then copied."""
    store = Store(tmp_path_factory.mktemp("empty"))
    store.open()
    store.close()
    return store.directory / DATABASE


@pytest.fixture(scope="session")
def postgres_empty(tmp_path_factory: pytest.TempPathFactory, postgres: Any) -> str:
    """The name of such a database."""
    name: str = postgres.new_database()
    store = Store(tmp_path_factory.mktemp("postgres-empty"), postgres.url(name))
    store.open()
    store.close()
    return name


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """What holds the registry of the suites of the test."""
    return getattr(request, "param", "sqlite")


@pytest.fixture
def suite_with(
    tmp_path: Path, backend: str, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Any]]:
    """An async context manager that starts a manager with the settings given.

    `stocked`: its store already holds what `stock` does.
    """
    databases: list[str] = []

    def prepare(stocked: bool) -> dict[str, Any]:
        store = tmp_path / "store"
        if backend == "sqlite":
            if stocked:
                shutil.copytree(request.getfixturevalue("stock"), store)
            elif not store.exists():
                store.mkdir()
                shutil.copy(request.getfixturevalue("empty_registry"), store)
            return {"store": store}
        postgres = request.getfixturevalue("postgres")
        if stocked:
            source, template = request.getfixturevalue("postgres_stock")
            shutil.copytree(source, store)
        else:
            template = request.getfixturevalue("postgres_empty")
        databases.append(postgres.new_database(template))
        return {"store": store, "database_url": postgres.url(databases[-1])}

    if backend == "postgresql":
        request.getfixturevalue("postgres")

    @asynccontextmanager
    async def make(*, stocked: bool = False, **more: Any) -> AsyncIterator[Suite]:
        how: dict[str, Any] = {
            **prepare(stocked),
            "port": 0,
            "drain_seconds": 0.2,
            "server_lease_seconds": 0.5,
            "report_interval_seconds": 20.0,
        }
        async with AsyncExitStack() as stack:
            suite = Suite(ModelsSettings(**(how | more)), stack)
            await suite.start()
            stack.push_async_callback(suite.stop)
            yield suite

    yield make
    for name in databases:
        request.getfixturevalue("postgres").drop_database(name)


@pytest.fixture
async def suite(suite_with: Callable[..., Any]) -> AsyncIterator[Suite]:
    async with suite_with() as made:
        yield made


@pytest.fixture
def helpers(pytestconfig: pytest.Config) -> Any:
    """What tests of this folder share: they cannot import one another."""
    s3 = pytestconfig.pluginmanager.get_plugin("pollard_tests_s3")

    class Helpers:
        Client = Client
        FollowingServer = FollowingServer
        Member = Member
        Reply = s3.Reply
        S3_KEYS = s3.S3_KEYS
        TIMEOUT = TIMEOUT
        graph = staticmethod(graph)
        manifest = staticmethod(manifest)
        packed = staticmethod(packed)
        info_of = staticmethod(info_of)
        eventually = staticmethod(eventually)
        revisions_of = staticmethod(revisions_of)
        route_of = staticmethod(route_of)

    return Helpers
