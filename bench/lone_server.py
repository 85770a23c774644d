"""A small manager for one inference server: says what to run, sends bundles, waits until it runs.

The real manager drains for as long as a request may take; the benchmarks of swaps need the server's
own part alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.models import large_model
from bench.pollard_server import tensor
from bench.process import ServerProcess, free_port, pollard_command
from pollard.bundle.v1 import bundle_pb2
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc
from pollard.models.v1 import model_service_pb2 as models_pb
from pollard.models.v1 import model_service_pb2_grpc as models_grpc
from pollard.runtime.bundle import MANIFEST, Bundle, write_bundle

_CHUNK = 1 << 20


@dataclass(frozen=True)
class ServedBundle:
    """A bundle as a revision of a model."""

    revision: int
    bundle: Bundle
    shadow: tuple[ServedBundle, float] | None = None
    """Another revision that is loaded beside it, and the share of the requests copied to it."""


@dataclass(frozen=True)
class Desired:
    """What the server is to run: each model's production."""

    models: Mapping[str, ServedBundle]


def large_bundle(folder: Path, seed: int, megabytes: int) -> Bundle:
    """Write a bundle of a model of so many megabytes."""
    manifest = bundle_pb2.Manifest(
        schema_version=1,
        name="large",
        task=bundle_pb2.TASK_RAW,
        variants=[
            bundle_pb2.Variant(
                name="cpu-fp32", target="cpu-fp32", model_file="model.onnx", max_batch_size=1
            )
        ],
        inputs=[tensor("x", (64,))],
        outputs=[tensor("y", (64,))],
    )
    return write_bundle(folder, manifest, {"model.onnx": large_model(seed, megabytes)})


@dataclass
class Latencies:
    """What a caller saw."""

    seconds: list[tuple[float, float]] = field(default_factory=list)
    """When a request was sent, on the clock of `time.perf_counter`, and how long it took."""
    failed: int = 0

    @property
    def answered(self) -> int:
        """Number of requests answered."""
        return len(self.seconds)


class Fleet(fleet_grpc.FleetServiceServicer, models_grpc.ModelServiceServicer):  # type: ignore[misc]
    """The manager's side, for one server."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        """Offer `bundles`."""
        self._bundles = {bundle.digest: bundle for bundle in bundles}
        self._version = 0
        self._orders: asyncio.Queue[fleet_pb.SyncResponse] = asyncio.Queue()
        self._answers: asyncio.Queue[fleet_pb.SyncRequest] = asyncio.Queue()
        self._statuses: list[Any] = []
        self._reported = asyncio.Event()
        self.address = ""

    async def apply(self, desired: Desired) -> None:
        """Order it and wait until the server has acknowledged it.

        Raises:
            RuntimeError: the server refused it.
        """
        self._version += 1
        state = fleet_pb.DesiredState(version=self._version, nonce=str(self._version))
        for name, served in desired.models.items():
            model = state.models.add(model=name)
            model.revisions.add(
                revision=served.revision,
                bundle_sha256=served.bundle.digest,
                size_bytes=served.bundle.size_bytes,
            )
            route = model.routes.add(alias="production")
            route.targets.add(revision=served.revision, weight=1)
            if served.shadow is not None:
                other, share = served.shadow
                model.revisions.add(
                    revision=other.revision,
                    bundle_sha256=other.bundle.digest,
                    size_bytes=other.bundle.size_bytes,
                )
                if share:
                    route.shadow.CopyFrom(
                        fleet_pb.Shadow(
                            revision=other.revision,
                            base_revision=served.revision,
                            share_ppm=round(share * 1e6),
                            output=other.bundle.manifest.outputs[0].name,
                        )
                    )
        state.report_interval.FromMilliseconds(500)
        self._orders.put_nowait(fleet_pb.SyncResponse(desired_state=state))
        while True:
            answer = await self._answers.get()
            if answer.HasField("nack") and answer.nack.version == self._version:
                raise RuntimeError(f"the server refused: {answer.nack}")
            if answer.HasField("ack") and answer.ack.version == self._version:
                return

    async def shadows(self) -> fleet_pb.ShadowCounters:
        """Return what the server's next report counts of copies."""
        self._reported.clear()
        await asyncio.wait_for(self._reported.wait(), 10)
        found = [s.counters.shadow for s in self._statuses if s.counters.HasField("shadow")]
        return found[0] if found else fleet_pb.ShadowCounters()

    async def settled(self) -> None:
        """Wait until no revision is draining any more."""
        while any(status.state != fleet_pb.REVISION_STATE_READY for status in self._statuses):
            self._reported.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reported.wait(), 5)

    @contextlib.asynccontextmanager
    async def caller(
        self, model: str, inputs: Mapping[str, Any], *, pause_seconds: float = 0.002
    ) -> AsyncIterator[Latencies]:
        """Send requests one after the other until the block ends."""
        seen = Latencies()
        request = pb.ModelInferRequest(model_name=model)
        for name, array in inputs.items():
            kind = {"uint8": "UINT8", "float32": "FP32"}[str(array.dtype)]
            request.inputs.add(name=name, datatype=kind, shape=array.shape)
            request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())

        async def call() -> None:
            async with grpc.aio.insecure_channel(self.address) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                while True:
                    started = time.perf_counter()
                    try:
                        await stub.ModelInfer(request, timeout=10)
                    except grpc.RpcError:
                        seen.failed += 1
                    else:
                        seen.seconds.append((started, time.perf_counter() - started))
                    await asyncio.sleep(pause_seconds)

        calling = asyncio.create_task(call())
        try:
            yield seen
        finally:
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)

    async def Sync(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Send orders; note answers and reports."""

        async def hear() -> None:
            async for request in requests:
                if request.HasField("report"):
                    self._statuses = list(request.report.revisions)
                    self._reported.set()
                elif not request.HasField("hello"):
                    self._answers.put_nowait(request)

        hearing = asyncio.create_task(hear())
        try:
            while True:
                yield await self._orders.get()
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)

    async def DownloadBundle(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Send a bundle's files in pieces."""
        bundle = self._bundles[request.bundle_sha256]
        for name in [MANIFEST, *(file.path for file in bundle.manifest.files)]:
            data = (bundle.path / name).read_bytes()
            for offset in range(0, max(len(data), 1), _CHUNK):
                yield models_pb.DownloadBundleResponse(
                    path=name,
                    offset=offset,
                    data=data[offset : offset + _CHUNK],
                    total_bytes=len(data),
                )


@contextlib.asynccontextmanager
async def start_fleet_server(
    cache: Path, bundles: Sequence[Bundle], *flags: str, command: Sequence[str] | None = None
) -> AsyncIterator[tuple[ServerProcess, Fleet]]:
    """Start a manager here and an inference server that follows it.

    Args:
        cache: Folder of the server.
        bundles: What the manager can send.
        flags: Further options of `pollard serve inference`.
        command: The `pollard` command; that of this environment when None.
    """
    fleet = Fleet(bundles)
    manager = grpc.aio.server()
    fleet_grpc.add_FleetServiceServicer_to_server(fleet, manager)
    models_grpc.add_ModelServiceServicer_to_server(fleet, manager)
    manager_port = manager.add_insecure_port("127.0.0.1:0")
    await manager.start()
    port = free_port()
    fleet.address = f"127.0.0.1:{port}"
    line = [
        *(command or pollard_command()),
        *("serve", "inference", "--port", str(port), "--manager", f"127.0.0.1:{manager_port}"),
        *("--cache-dir", str(cache), *flags),
    ]
    # A first, empty order makes it ready.
    first = asyncio.create_task(fleet.apply(Desired({})))
    server = await asyncio.to_thread(
        ServerProcess.start, "Pollard", line, port, cache.with_suffix(".log")
    )
    try:
        await first
        yield server, fleet
    finally:
        await asyncio.to_thread(server.stop)
        await manager.stop(None)
