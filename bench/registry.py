"""How a large registry answers: `python -m bench.registry`.

A store with 10,000 revisions of 1,000 models (their rows and small files made here, as a manager
would have left them), and a manager of its own process on it: how long it takes to start, to list
and show, and until a server that connects has its desired state of 20 models. One client asks, one
request after the other.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf import json_format
from sqlalchemy import insert

from bench.environment import environment, heading
from bench.lone_server import large_bundle
from bench.peers.fetch import ROOT
from bench.process import free_port, pollard_command
from pollard.bundle.v1 import bundle_pb2
from pollard.client import ModelsClient
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc
from pollard.models.v1 import model_service_pb2 as pb
from pollard.models.v1 import model_service_pb2_grpc as pb_grpc
from pollard.services.models.blobs import blob_path
from pollard.services.models.schema import (
    Alias,
    Base,
    Bundle,
    BundleFile,
    Event,
    Model,
    Revision,
)
from pollard.services.models.store import Store

_GOAL_START_SECONDS = 2.0
_GOAL_LIST_MS = 20.0
_GOAL_SYNC_MS = 100.0

_FILES = ("model.onnx", "golden.npz", "report.json")


def _blob(store: Path, content: bytes) -> tuple[str, int]:
    sha256 = hashlib.sha256(content).hexdigest()
    path = store / "blobs" / blob_path(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return sha256, len(content)


def _fill(directory: Path, manifest: bundle_pb2.Manifest, models: int, each: int) -> None:
    """Write models with revisions of their own files, and let `production` lead to the last."""
    store = Store(directory)
    store.open()
    rows: dict[type[Base], list[dict[str, Any]]] = {
        kind: [] for kind in (Model, Bundle, BundleFile, Revision, Alias, Event)
    }
    now = time.time_ns() // 1000
    event = 0

    def happened(model: str, action: str, resource: str) -> int:
        nonlocal event
        event += 1
        rows[Event].append(
            {"time": now, "actor": "bench", "action": action, "model": model, "resource": resource}
        )
        return event

    for index in range(models):
        name = f"model-{index:05}"
        etag = happened(name, "MODEL_CREATED", f"models/{name}")
        times = {"create_time": now, "update_time": now}
        rows[Model].append({"name": name, **times, "latest_revision": each, "etag": etag})
        for number in range(1, each + 1):
            manifest.provenance.tool_versions["bench"] = f"{index}.{number}"
            text = json_format.MessageToJson(manifest).encode()
            sha256, size = _blob(directory, text)
            files = [("manifest.json", sha256, size)]
            files += [
                (path, *_blob(directory, f"{path} of {index}.{number}".encode() * 20))
                for path in _FILES
            ]
            rows[Bundle].append({"sha256": sha256, "size_bytes": size, "signature": "[]"})
            rows[BundleFile] += [
                {
                    "bundle_sha256": sha256,
                    "path": path,
                    "position": place,
                    "sha256": digest,
                    "size_bytes": length,
                }
                for place, (path, digest, length) in enumerate(files)
            ]
            resource = f"models/{name}/revisions/{number}"
            rows[Revision].append(
                {
                    "model": name,
                    "number": number,
                    "bundle_sha256": sha256,
                    "state": pb.Revision.STATE_READY,
                    "creator": "bench",
                    "create_time": now,
                    "etag": happened(name, "REVISION_UPLOADED", resource),
                }
            )
    store.write_now(
        lambda session: [session.execute(insert(kind), rows[kind]) for kind in rows if rows[kind]]
    )
    store.close()


class _Manager:
    """`pollard serve models` on the store."""

    def __init__(self, store: Path, log: Path) -> None:
        port = free_port()
        command = [*pollard_command(), "serve", "models", "--port", str(port)]
        began = time.perf_counter()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--store", str(store)], stdout=file, stderr=subprocess.STDOUT
            )
        self.address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(
            self.address,
            options=[
                ("grpc.initial_reconnect_backoff_ms", 20),
                ("grpc.max_reconnect_backoff_ms", 20),
            ],
        ) as channel:
            pb_grpc.ModelServiceStub(channel).ListModels(
                pb.ListModelsRequest(page_size=1), wait_for_ready=True, timeout=120
            )
        self.start_seconds = time.perf_counter() - began

    def __enter__(self) -> _Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def _timed(call: Callable[[], object], times: int) -> dict[str, float]:
    """Return p50 and p99 of a call in milliseconds."""
    call()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append((time.perf_counter() - began) * 1e3)
    taken.sort()
    return {"p50_ms": statistics.median(taken), "p99_ms": taken[int(len(taken) * 0.99)]}


def _first_state(stub: fleet_grpc.FleetServiceStub, models: int) -> None:
    """Connect as a server that knows nothing, and wait for the first desired state."""
    done = False

    def messages() -> Iterator[fleet_pb.SyncRequest]:
        hello = fleet_pb.Hello(
            server_id="bench", kind=fleet_pb.SERVER_KIND_PREPROCESS, address="127.0.0.1:1"
        )
        yield fleet_pb.SyncRequest(hello=hello)
        while not done:
            time.sleep(0.005)

    call = stub.Sync(messages(), timeout=30)
    state = next(call).desired_state
    done = True
    call.cancel()
    if len(state.models) != models:
        raise RuntimeError(f"{len(state.models)} models are desired, not {models}")


def _ask(address: str, models: int, served: int, times: int) -> dict[str, dict[str, float]]:
    turn = iter(range(10**9))

    def name() -> str:
        return f"model-{next(turn) * 7919 % models:05}"

    with ModelsClient(address, timeout=60) as client:
        for index in range(served):
            client.set_alias(f"model-{index:05}", "production", 1)
        with grpc.insecure_channel(address) as channel:
            stub = pb_grpc.ModelServiceStub(channel)
            fleet = fleet_grpc.FleetServiceStub(channel)
            tokens = [""]
            while len(tokens) < models // 50:
                page = stub.ListModels(pb.ListModelsRequest(page_token=tokens[-1]))
                tokens.append(page.next_page_token)
            return {
                "list models, a page of 50": _timed(
                    lambda: stub.ListModels(
                        pb.ListModelsRequest(page_token=tokens[next(turn) % len(tokens)])
                    ),
                    times,
                ),
                "list models, newest first": _timed(
                    lambda: stub.ListModels(pb.ListModelsRequest(order_by="update_time desc")),
                    times,
                ),
                "list revisions of a model": _timed(
                    lambda: stub.ListRevisions(pb.ListRevisionsRequest(parent=f"models/{name()}")),
                    times,
                ),
                "show a model": _timed(lambda: client.model(name()), times),
                "show a revision with its manifest": _timed(
                    lambda: client.revision(name(), revision=1), times
                ),
                "list events, a page of 50": _timed(lambda: client.events(limit=50), times),
                f"Sync of a server, {served} models": _timed(
                    lambda: _first_state(fleet, served), max(20, times // 10)
                ),
            }


def main(
    models: Annotated[int, typer.Option(help="Models.")] = 1000,
    revisions: Annotated[int, typer.Option(help="Revisions of each.")] = 10,
    served: Annotated[int, typer.Option(help="Models with a revision in production.")] = 20,
    times: Annotated[int, typer.Option(help="Requests of each kind.")] = 500,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Measure it; exit with 1 if a goal is missed."""
    before = environment()
    with tempfile.TemporaryDirectory(prefix="pollard-registry-") as folder:
        root = Path(folder)
        manifest = large_bundle(root / "bundle", 1, 1).manifest
        with _Manager(root / "empty", root / "log") as manager:
            empty = [manager.start_seconds]
        for _ in range(2):
            with _Manager(root / "empty", root / "log") as manager:
                empty.append(manager.start_seconds)
        _fill(root / "store", manifest, models, revisions)
        starts = []
        for _ in range(3):
            with _Manager(root / "store", root / "log") as manager:
                starts.append(manager.start_seconds)
        with _Manager(root / "store", root / "log") as manager:
            found = _ask(manager.address, models, served, times)
    start, bare = statistics.median(starts), statistics.median(empty)
    lists = {name: figures for name, figures in found.items() if not name.startswith("Sync")}
    sync = next(figures for name, figures in found.items() if name.startswith("Sync"))
    text = "\n".join(
        [
            "# A large registry",
            "",
            heading(before),
            "",
            f"{models * revisions:,} revisions of {models:,} models on SQLite, {served} of them in "
            f"production; one client, {times} requests of each kind, one after the other.",
            "",
            f"- from `pollard serve models` to its first answer: {start:.2f} s, the median of 3 "
            f"(goal {_GOAL_START_SECONDS:g} s); with an empty store {bare:.2f} s",
            "",
            "| request | p50 | p99 | goal |",
            "|---|---|---|---|",
            *(
                f"| {name} | {figures['p50_ms']:.2f} ms | {figures['p99_ms']:.2f} ms | "
                f"p99 {_GOAL_SYNC_MS if figures is sync else _GOAL_LIST_MS:g} ms |"
                for name, figures in found.items()
            ),
            "",
        ]
    )
    print(text)
    file = out / f"registry-{time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    result = {"environment": before, "start_seconds": starts, "empty_start_seconds": empty}
    file.with_suffix(".json").write_text(json.dumps({**result, "requests": found}, indent=1) + "\n")
    if (
        start > _GOAL_START_SECONDS
        or sync["p99_ms"] > _GOAL_SYNC_MS
        or any(figures["p99_ms"] > _GOAL_LIST_MS for figures in lists.values())
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
