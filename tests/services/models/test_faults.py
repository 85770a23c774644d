"""What dies or stops: nothing acknowledged is lost, and the words say what to do."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import StartupError
from pollard.services.models.main import build_server
from pollard.services.models.settings import ModelsSettings
from pollard.services.models.store import DATABASE

CODE = grpc.StatusCode

PROGRAM = """
import json, sys
from pollard.services.models.main import run
from pollard.services.models.settings import ModelsSettings
sys.exit(run(ModelsSettings.load(json.loads(sys.argv[1]))))
"""


class Manager:
    """A manager in a process of its own, which can be killed."""

    def __init__(self, store: Path, helpers: Any) -> None:
        self.store = store
        self._helpers = helpers
        self.process: asyncio.subprocess.Process | None = None
        self.client: Any = None

    async def spawn(self, **more: Any) -> asyncio.subprocess.Process:
        settings = {"store": str(self.store), "port": 0, "log_format": "json"} | more
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, json.dumps(settings), stderr=subprocess.PIPE
        )

    async def start(self, **more: Any) -> None:
        how = {"drain_seconds": 0.1, "server_lease_seconds": 5.0} | more
        self.process = await self.spawn(**how)
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            async for line in self.process.stderr:
                entry = json.loads(line)
                if entry["event"] == "serving":
                    self.client = self._helpers.Client(entry["address"])
                    self._reading = asyncio.create_task(self._drain_log(self.process.stderr))
                    return
        raise AssertionError("the manager did not start")

    async def join(self, server_id: str) -> Any:
        return await self._helpers.FollowingServer(self.client, server_id).open()

    @staticmethod
    async def _drain_log(log: asyncio.StreamReader) -> None:
        async for _ in log:
            pass

    async def end(self, number: int = signal.SIGKILL) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        code = await process.wait()
        await self._reading
        await self.client.close()
        return code


@pytest.fixture
async def manager(tmp_path: Path, stock: Path, helpers: Any) -> AsyncIterator[Manager]:
    """Not started; its store has three revisions of `m`, the first in production."""
    shutil.copytree(stock, tmp_path / "store")
    made = Manager(tmp_path / "store", helpers)
    yield made
    await made.end()


@pytest.mark.long
async def test_an_upload_survives_kills_at_any_moment(
    manager: Manager, bundles: Any, helpers: Any
) -> None:
    """Whatever the moment, the upload goes on from the committed size and ends well."""
    chance = random.Random(7)
    bundle = bundles.make(9, **{"ballast.bin": chance.randbytes(2_000_000)})
    tar = helpers.packed(bundle)
    await manager.start()
    header = manager.client.header(tar, "new")
    asking = pb.GetUploadRequest(parent="models/new", upload_id=header.upload_id)

    async def attempt(until: float | None) -> Any:
        try:
            header.write_offset = (await manager.client.models.GetUpload(asking)).committed_bytes
        except grpc.aio.AioRpcError as error:
            if error.code() != CODE.NOT_FOUND:
                raise
            header.write_offset = 0
        sending = asyncio.ensure_future(manager.client.send(header, tar, chunk=20_000))
        await asyncio.wait({sending}, timeout=until)
        if until is not None:
            await manager.end()
            await asyncio.wait({sending})
            failed = sending.cancelled() or sending.exception() is not None
            return None if failed else sending.result()
        return await sending

    seen = 0
    acknowledged = None
    for _ in range(5):
        answer = await attempt(chance.uniform(0.0, 0.6))
        acknowledged = acknowledged or answer
        await manager.start()
        assert header.write_offset >= seen
        seen = header.write_offset
        listed = await manager.client.models.ListModels(pb.ListModelsRequest())
        names = [model.name for model in listed.models]
        assert acknowledged is None or "models/new" in names
    answer = await attempt(None)
    assert answer.revision.revision == 1
    got = await manager.client.download(name="models/new/revisions/1")
    assert got["ballast.bin"] == (bundle.path / "ballast.bin").read_bytes()
    events = await manager.client.models.ListEvents(pb.ListEventsRequest(model="models/new"))
    assert [event.action for event in events.events].count("REVISION_UPLOADED") == 1
    assert not list((manager.store / "uploads").iterdir())


@pytest.mark.long
async def test_an_acknowledged_alias_survives_a_kill(manager: Manager) -> None:
    await manager.start()
    for target in (2, 3, 1):
        await manager.client.set_alias(target)
        await manager.end()
        await manager.start()
        alias = await manager.client.alias()
        assert target in (alias.revision, alias.pending_revision)
        assert alias.state != pb.Alias.STATE_FAILED


class Follower:
    """A server that comes back to whatever manager there is, and checks each state."""

    def __init__(self, server_id: str, kind: Any, helpers: Any) -> None:
        self.server_id, self.kind, self._helpers = server_id, kind, helpers
        self.version = 0
        self.loaded: set[int] = set()
        self.routes: list[int] = []
        self.problems: list[str] = []

    async def follow(self, client: Any) -> None:
        outbox: asyncio.Queue[fleet_pb.SyncRequest] = asyncio.Queue()
        hello = fleet_pb.Hello(
            server_id=self.server_id,
            kind=self.kind,
            address=f"{self.server_id}:1",
            applied_version=self.version,
        )
        outbox.put_nowait(fleet_pb.SyncRequest(hello=hello))

        async def messages() -> AsyncIterator[fleet_pb.SyncRequest]:
            while True:
                yield await outbox.get()

        async for response in client.fleet.Sync(messages()):
            state = response.desired_state
            if state.version < self.version:
                self.problems.append(f"version {state.version} after {self.version}")
            wanted = set(self._helpers.revisions_of(state))
            route = self._helpers.route_of(state)
            if route not in wanted:
                self.problems.append(f"route to {route}, which is not in {wanted}")
            if self.version and route not in self.loaded:
                self.problems.append(f"route to {route}, of which only {self.loaded} are loaded")
            await asyncio.sleep(0.02)
            self.version, self.loaded = state.version, wanted
            self.routes.append(int(route or 0))
            entries = [
                fleet_pb.RevisionStatus(
                    model="m", revision=number, state=fleet_pb.REVISION_STATE_READY
                )
                for number in wanted
            ]
            outbox.put_nowait(fleet_pb.SyncRequest(report=fleet_pb.Report(revisions=entries)))
            ack = fleet_pb.Ack(version=state.version, nonce=state.nonce)
            outbox.put_nowait(fleet_pb.SyncRequest(ack=ack))


@pytest.mark.long
async def test_switches_survive_kills_of_the_manager_at_any_moment(
    manager: Manager, helpers: Any
) -> None:
    """Servers never see versions go back, nor a route to what they have not loaded."""
    chance = random.Random(11)
    followers = [
        Follower("i1", fleet_pb.SERVER_KIND_INFERENCE, helpers),
        Follower("i2", fleet_pb.SERVER_KIND_INFERENCE, helpers),
        Follower("p1", fleet_pb.SERVER_KIND_PREPROCESS, helpers),
    ]
    await manager.start()
    target = 1
    for kill in (True, True, True, True, True, True, False):
        tasks = [asyncio.create_task(f.follow(manager.client)) for f in followers]
        for follower in followers:
            await helpers.eventually(
                lambda follower=follower: manager.client.server(follower.server_id),
                lambda server: server.connected and server.acked_version > 0,
            )
        target = chance.choice([number for number in (1, 2, 3) if number != target])
        await manager.client.set_alias(target)
        if kill:
            await asyncio.sleep(chance.uniform(0, 0.4))
            await manager.end()
        else:
            alias = await manager.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
            assert alias.revision == target
            for follower in followers:
                await helpers.eventually(
                    lambda follower=follower: asyncio.sleep(0, follower.loaded),
                    lambda loaded, target=target: loaded == {target},
                )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if kill:
            await manager.start()
            alias = await manager.client.alias()
            assert target in (alias.revision, alias.pending_revision)
    assert [follower.problems for follower in followers] == [[], [], []]


async def test_a_second_manager_on_one_store_is_turned_away(manager: Manager) -> None:
    await manager.start()
    second = await manager.spawn()
    _, log = await second.communicate()
    assert second.returncode == 1
    assert b"another manager" in log
    assert str(manager.process.pid if manager.process else "?").encode() in log
    assert (await manager.client.alias()).revision == 1


async def test_a_port_in_use_is_said_and_the_store_is_free_again(
    tmp_path: Path, manager: Manager
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await manager.spawn(port=port)
        _, log = await process.communicate()
        assert process.returncode == 1
        assert b"port is in use" in log
        service = build_server(ModelsSettings(store=manager.store, port=port))
        with pytest.raises(StartupError, match="port is in use"):
            await service.start()
    service = build_server(ModelsSettings(store=manager.store, port=0))
    await service.start()
    await service.stop(0)


async def test_sigterm_stops_it_cleanly(manager: Manager) -> None:
    await manager.start()
    assert await manager.end(signal.SIGTERM) == 0


COLLECTING = """
import sys
from pathlib import Path
from pollard.services.models.blobs_local import LocalBlobs
from pollard.services.models.collector import Collector, release_dead
from pollard.services.models.store import Store
store = Store(Path(sys.argv[1]))
store.open()
store.write_now(lambda session: release_dead(session, store.manager_id))
Collector(store, LocalBlobs(store.blobs)).collect()
"""


@pytest.mark.long
async def test_kills_while_collecting_lose_nothing_that_is_needed(
    manager: Manager, bundles: Any, helpers: Any
) -> None:
    """Killed after some of the deletions, it collects the rest, and what was pushed is whole."""
    chance = random.Random(21)
    tar = bundles.tar(9)
    orphans = manager.store / "blobs" / "sha256" / "00"
    orphans.mkdir(exist_ok=True)
    wanted = helpers.graph(9, 4)
    needed_again = hashlib.sha256(wanted).hexdigest()
    for number in range(1200):
        (orphans / f"00{number:062x}").write_bytes(b"nobody's")
    home = manager.store / "blobs" / "sha256" / needed_again[:2]
    home.mkdir(exist_ok=True)
    (home / needed_again).write_bytes(wanted)

    def left() -> int:
        return sum(1 for path in orphans.iterdir() if path.name.startswith("0" * 50))

    for most in (1199, chance.randrange(300, 900), 1):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", COLLECTING, str(manager.store), stderr=subprocess.PIPE
        )
        while left() > most:
            assert process.returncode is None
            await asyncio.sleep(0.002)
        process.kill()
        await process.communicate()
    await manager.start()
    await helpers.eventually(lambda: asyncio.sleep(0, left()), lambda count: count == 0)
    assert (await manager.client.push(tar)).revision.revision == 4
    for number in range(1, 5):
        got = await manager.client.download(name=f"models/m/revisions/{number}")
        assert got["cpu-fp32/model.onnx"]
    assert got["cpu-fp32/model.onnx"] == wanted

    async def held() -> int:
        with contextlib.closing(sqlite3.connect(manager.store / DATABASE)) as database:
            return int(database.execute("SELECT count(*) FROM blob_holds").fetchone()[0])

    await helpers.eventually(held, lambda count: count == 0)


@pytest.mark.long
async def test_a_client_that_stops_reading_a_download_holds_up_nothing(
    suite: Any, bundles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 40_000_000
    await suite.client.push(bundles.tar(1, **{"ballast.bin": bytes(size)}))
    read = 0
    pieces = suite.service.blobs.pieces

    def counted(sha256: str, *size: Any) -> Iterator[bytes]:
        nonlocal read
        for piece in pieces(sha256, *size):
            read += len(piece)
            yield piece

    monkeypatch.setattr(suite.service.blobs, "pieces", counted)
    call = suite.client.models.DownloadBundle(pb.DownloadBundleRequest(name="models/m/revisions/1"))
    async for piece in call:
        if piece.path == "ballast.bin":
            break
    before = -1
    while before != read:
        before = read
        await asyncio.sleep(0.3)
    # What the connection takes is on its way, and no more is read.
    assert read < size / 2
    other = type(suite.client)(suite.service.address)
    assert (await other.push(bundles.tar(2))).revision.revision == 2
    assert len((await other.download(name="models/m/revisions/1"))["ballast.bin"]) == size
    await other.close()
    call.cancel()


@pytest.mark.long
async def test_a_rollout_survives_kills_at_any_moment(manager: Manager) -> None:
    """Whatever the moment, it goes on at the step it was at, and never back to an earlier one."""
    chance = random.Random(11)
    await manager.start()
    counters = {number: fleet_pb.Counters() for number in (1, 2)}
    server = await manager.join("i1")
    await manager.client.models.CreateRollout(
        pb.CreateRolloutRequest(
            parent="models/m",
            rollout=pb.Rollout(
                revision=2,
                steps=[5, 25, 50, 100],
                hold=Duration(nanos=20_000_000),
                gates=pb.RolloutGates(min_requests=100),
            ),
        )
    )

    def report() -> None:
        counters[1].succeeded += 400
        counters[2].succeeded += 20
        server.say(
            report=fleet_pb.Report(
                revisions=[
                    fleet_pb.RevisionStatus(
                        model=m.model,
                        revision=r.revision,
                        state=fleet_pb.REVISION_STATE_READY,
                        counters=counters[r.revision],
                    )
                    for m in server.states[-1].models
                    for r in m.revisions
                ]
            )
        )

    steps: list[int] = []
    kills = 0
    next_kill = asyncio.get_running_loop().time() + chance.uniform(0, 0.3)
    async with asyncio.timeout(120):
        while True:
            if asyncio.get_running_loop().time() >= next_kill and kills < 4:
                kills += 1
                await manager.end()
                await server.close()
                await manager.start()
                server = await manager.join("i1")
                next_kill = asyncio.get_running_loop().time() + chance.uniform(0, 0.3)
            found = await manager.client.models.GetRollout(
                pb.GetRolloutRequest(name="models/m/rollouts/1")
            )
            steps.append(found.rollout.step)
            if found.rollout.HasField("end_time"):
                break
            report()
            await asyncio.sleep(0.01)
    assert found.rollout.state == pb.Rollout.STATE_PROMOTED
    assert steps == sorted(steps)
    assert kills
    alias = await manager.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
    assert (alias.revision, alias.previous_revision) == (2, 1)
    await server.close()


@pytest.mark.long
async def test_what_a_step_has_seen_survives_a_kill(manager: Manager, helpers: Any) -> None:
    """Counters go on from where they stood, also with what came while there was no manager."""
    await manager.start()
    server = await manager.join("i1")
    name = "models/m/rollouts/1"
    made = pb.Rollout(
        revision=2,
        steps=[5, 100],
        hold=Duration(seconds=3600),
        gates=pb.RolloutGates(min_requests=100),
    )
    await manager.client.models.CreateRollout(
        pb.CreateRolloutRequest(parent="models/m", rollout=made)
    )
    await server.state_when(
        lambda state: len(state.models[0].routes[0].targets) == 2 and state is server.states[-1]
    )

    def report(canary: int, base: int, run: str = "first") -> None:
        counts = {1: (base, 0), 2: (canary - 1, 1) if canary else (0, 0)}
        server.say(
            report=fleet_pb.Report(
                revisions=[
                    fleet_pb.RevisionStatus(
                        model="m",
                        revision=number,
                        state=fleet_pb.REVISION_STATE_READY,
                        counters=fleet_pb.Counters(succeeded=succeeded, failed=failed, run_id=run),
                    )
                    for number, (succeeded, failed) in counts.items()
                ]
            )
        )

    async def seen(requests: int) -> pb.RolloutEvidence:
        async def look() -> pb.RolloutEvidence:
            asking = pb.GetRolloutRequest(name=name)
            return (await manager.client.models.GetRollout(asking)).rollout.evidence

        found: pb.RolloutEvidence = await helpers.eventually(
            look, lambda evidence: evidence.revision.requests == requests
        )
        return found

    async def look() -> bool:
        asking = pb.GetRolloutRequest(name=name)
        found = (await manager.client.models.GetRollout(asking)).rollout
        return bool(found.HasField("evidence"))

    await helpers.eventually(look, bool)
    report(10, 200)  # before the step: where the counters stand
    report(70, 1400)
    evidence = await seen(60)
    assert (evidence.revision.failed, evidence.base.requests) == (0, 1200)
    assert "40 more requests (of 100)" in evidence.waiting_for[-1]
    await manager.end()
    await server.close()
    await manager.start()
    assert (await seen(60)).base.requests == 1200
    server = await manager.join("i1")
    report(100, 2000)
    assert (await seen(90)).base.requests == 1800
    # A server that started anew has counted all of it since, however much that is.
    report(500, 9000, run="second")
    assert (await seen(590)).base.requests == 10_800
    await server.close()
