"""Numbers that a registry gives again after a restore, to other bundles than servers know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.inference.main import InferenceServer, build_server
from pollard.services.inference.settings import InferenceSettings
from pollard.services.models.backup import back_up, restore
from pollard.services.models.blobs_local import LocalBlobs
from pollard.services.models.database import make_database
from pollard.services.models.store import DATABASE

READY = fleet_pb.REVISION_STATE_READY
FAILED = fleet_pb.REVISION_STATE_FAILED
ACTIVE = pb.Alias.STATE_ACTIVE
ANOTHER = {("m", 2): "a" * 64}
"""Of a bundle that had the number before the registry was restored."""


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


def digests_of(state: fleet_pb.DesiredState) -> dict[tuple[str, int], str]:
    return {(m.model, r.revision): r.bundle_sha256 for m in state.models for r in m.revisions}


async def seen(suite: Any, helpers: Any, server_id: str, digest: str) -> None:
    """Wait until the manager has heard that a server has a bundle as revision 2, and acted."""

    def told(server: fleet_pb.Server) -> bool:
        return ("m", 2, digest) in {
            (status.model, status.revision, status.bundle_sha256)
            for status in server.report.revisions
        }

    await helpers.eventually(lambda: suite.client.server(server_id), told)
    # Nothing shows that the step which this causes has been taken without any effect.
    await asyncio.sleep(0.3)


async def revision(suite: Any, number: int) -> pb.Revision:
    request = pb.GetRevisionRequest(name=f"models/m/revisions/{number}")
    return (await suite.client.models.GetRevision(request, timeout=30)).revision


async def test_a_switch_waits_for_the_bundle_and_not_for_its_number(
    loaded: Any, helpers: Any
) -> None:
    server = await loaded.join("i", automatic=False)
    server.ack(server.states[-1])
    await loaded.client.set_alias(2)
    state = await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
    for said in (READY, FAILED):
        server.report(("m", 1, READY), ("m", 2, said), digests=ANOTHER)
        await seen(loaded, helpers, "i", "a" * 64)
        assert (await loaded.client.alias()).state == pb.Alias.STATE_LOADING
        assert (await revision(loaded, 2)).state == pb.Revision.STATE_CHECKED
        assert server.states[-1] == state
    server.report(("m", 1, READY), ("m", 2, READY), digests=digests_of(state))
    state = await server.state_when(lambda s: helpers.route_of(s) == 2)
    assert (await revision(loaded, 2)).state == pb.Revision.STATE_READY
    server.ack(state)
    await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 2)


async def test_a_server_that_refuses_and_keeps_the_other_bundle_counts_as_refusing(
    loaded: Any, helpers: Any
) -> None:
    await loaded.join("good")
    pre = await loaded.join("pre", kind=fleet_pb.SERVER_KIND_PREPROCESS)
    server = await loaded.join("bad", automatic=False)
    server.ack(server.states[-1])
    await loaded.client.set_alias(2, quorum=pb.Quorum(servers=1))
    state = await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
    server.report(("m", 1, READY), ("m", 2, READY), digests=ANOTHER)
    server.nack(state, "does not fit")
    state = await pre.state_when(lambda s: helpers.route_of(s) == 2)
    alias = await loaded.client.alias()
    assert [(f.server_id, f.status.message) for f in alias.failures] == [("bad", "does not fit")]
    refused = {
        endpoint.server_id: [(item.model, item.revision) for item in endpoint.refused]
        for endpoint in state.inference_endpoints
    }
    assert refused == {"good": [], "bad": [("m", 2)]}
    # That it is ready with the other one is no end of its refusal.
    server.report(("m", 1, READY), ("m", 2, READY), digests=ANOTHER | {("m", 1): "b" * 64})
    await seen(loaded, helpers, "bad", "a" * 64)
    assert [f.server_id for f in (await loaded.client.alias()).failures] == ["bad"]


async def test_a_rollout_waits_for_the_bundle_and_counts_its_requests_alone(
    loaded: Any, helpers: Any
) -> None:
    server = await loaded.join("i", automatic=False)
    server.ack(server.states[-1])

    def report(succeeded: int, failed: int, digest: str) -> None:
        counters = fleet_pb.Counters(succeeded=succeeded, failed=failed)
        server.say(
            report=fleet_pb.Report(
                revisions=[
                    fleet_pb.RevisionStatus(
                        model="m",
                        revision=2,
                        state=READY,
                        bundle_sha256=digest,
                        counters=counters,
                    )
                ]
            )
        )

    async def rollout() -> pb.Rollout:
        request = pb.GetRolloutRequest(name="models/m/rollouts/1")
        return (await loaded.client.models.GetRollout(request, timeout=30)).rollout

    def splits(state: fleet_pb.DesiredState) -> bool:
        return any(len(route.targets) == 2 for m in state.models for route in m.routes)

    request = pb.CreateRolloutRequest(
        parent="models/m",
        rollout=pb.Rollout(
            revision=2,
            steps=[50, 100],
            hold=Duration(seconds=60),
            gates=pb.RolloutGates(min_requests=50),
        ),
    )
    await loaded.client.models.CreateRollout(request, timeout=30)
    state = await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
    report(0, 0, "a" * 64)
    await seen(loaded, helpers, "i", "a" * 64)
    assert not any(splits(s) for s in server.states)
    digest = digests_of(state)["m", 2]
    report(0, 0, digest)
    server.ack(await server.state_when(splits))
    await helpers.eventually(rollout, lambda r: r.HasField("evidence"))
    # What the other bundle failed does not end it.
    for failed in (1000, 2000):
        report(0, failed, "a" * 64)
        await asyncio.sleep(0.3)
    assert (await rollout()).state == pb.Rollout.STATE_CANARY
    report(0, 1000, digest)
    ended = await helpers.eventually(rollout, lambda r: r.HasField("end_time"))
    assert ended.state == pb.Rollout.STATE_ROLLED_BACK


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "refused"])
async def test_after_a_restore_nothing_leads_to_a_bundle_that_no_server_has(
    suite_with: Callable[..., Any], bundles: Any, helpers: Any, tmp_path: Path, runs: bool
) -> None:
    """An inference server comes back with the bundle that had the number before."""

    async def start(manager: str) -> InferenceServer:
        server = build_server(
            InferenceSettings.load(
                {
                    "port": 0,
                    "manager": manager,
                    "server_id": "i",
                    "cache_dir": tmp_path / "cache",
                    "memory_headroom_bytes": 0,
                    "measure": False,
                }
            )
        )
        await server.start()
        return server

    async with AsyncExitStack() as stack:
        suite = await stack.enter_async_context(suite_with(stocked=False))
        await suite.client.push(bundles.tar(1))
        await suite.client.set_alias(1)
        await suite.client.alias_when(lambda a: a.state == ACTIVE)
        database = make_database("", suite.settings.store, DATABASE)
        blobs = LocalBlobs(suite.settings.store / "blobs")
        await asyncio.to_thread(back_up, database, blobs, tmp_path / "backup")
        before = (await suite.client.push(bundles.tar(2))).revision
        server = await start(suite.service.address)
        try:
            await suite.client.set_alias(2)
            await suite.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 2)
        finally:
            await server.stop(1.0)
        await suite.stop()

        await asyncio.to_thread(
            restore,
            tmp_path / "backup",
            tmp_path / "new",
            lambda made: make_database("", made, DATABASE),
            lambda made: LocalBlobs(made / "blobs"),
        )
        suite.settings = suite.settings.model_copy(update={"store": tmp_path / "new"})
        await suite.start()
        says = helpers.manifest()
        if not runs:
            says.variants[0].requirements.cpu_features.append("no_such_flag")
        after = (await suite.client.push(bundles.tar(3, says=says))).revision
        assert (before.name, after.name) == ("models/m/revisions/2",) * 2
        assert before.bundle_sha256 != after.bundle_sha256
        # Another server, which has not loaded it yet, keeps the switch on its way.
        slow = await suite.join("slow", automatic=False)
        await suite.client.set_alias(2)
        state = await slow.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
        server = await start(suite.service.address)
        stack.push_async_callback(server.stop, 1.0)
        await helpers.eventually(lambda: suite.client.server("i"), lambda s: s.connected)
        slow.report(("m", 1, READY), ("m", 2, READY), digests=digests_of(state))
        alias = await suite.client.alias_when(
            lambda a: a.state in (ACTIVE, pb.Alias.STATE_SWITCHING, pb.Alias.STATE_FAILED)
        )
        if not runs:
            assert (alias.state, alias.revision) == (pb.Alias.STATE_FAILED, 1)
            assert [failure.server_id for failure in alias.failures] == ["i"]
            return
        assert alias.revision == 2
        served = {
            (status.revision, status.state, status.bundle_sha256)
            for status in server.member.statuses()
        }
        assert (2, READY, after.bundle_sha256) in served
