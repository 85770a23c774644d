"""Rollouts in steps, with servers on real Sync streams that count requests."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb

CODE = grpc.StatusCode
READY = fleet_pb.REVISION_STATE_READY
FAILED = fleet_pb.REVISION_STATE_FAILED
CANARY = pb.Rollout.STATE_CANARY
PAUSED = pb.Rollout.STATE_PAUSED
PROMOTED = pb.Rollout.STATE_PROMOTED
ROLLED_BACK = pb.Rollout.STATE_ROLLED_BACK
ACTIVE = pb.Alias.STATE_ACTIVE

ALIAS = "models/m/aliases/production"
NAME = "models/m/rollouts/1"


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


async def create(suite: Any, revision: int = 2, **more: Any) -> pb.Rollout:
    how: dict[str, Any] = {
        "steps": [5, 50, 100],
        "hold": Duration(nanos=10_000_000),
        "gates": pb.RolloutGates(min_requests=50),
    }
    request = pb.CreateRolloutRequest(
        parent="models/m", rollout=pb.Rollout(revision=revision, **(how | more))
    )
    return (await suite.client.models.CreateRollout(request, timeout=30)).rollout


async def rollout(suite: Any) -> pb.Rollout:
    request = pb.GetRolloutRequest(name=NAME)
    return (await suite.client.models.GetRollout(request, timeout=30)).rollout


def targets_of(state: fleet_pb.DesiredState) -> dict[int, int]:
    """Where production leads, with the weights."""
    return {
        target.revision: target.weight
        for model in state.models
        for route in model.routes
        if (model.model, route.alias) == ("m", "production")
        for target in route.targets
    }


class Counting:
    """Reports of a server whose requests the test makes up."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.counts: dict[int, fleet_pb.Counters] = {}

    def count(self, revision: int, succeeded: int = 0, failed: int = 0, bucket: int = 160) -> None:
        """Requests to a revision, the good ones all in one bucket of the latency."""
        counters = self.counts.setdefault(revision, fleet_pb.Counters())
        counters.succeeded += succeeded
        counters.failed += failed
        histogram = counters.latency
        if not histogram.counts:
            histogram.scale, histogram.offset = 16, 0
            histogram.counts.extend([0] * 400)
        histogram.counts[bucket] += succeeded

    def report(self) -> None:
        state = self.server.states[-1]
        self.server.say(
            report=fleet_pb.Report(
                revisions=[
                    fleet_pb.RevisionStatus(
                        model=m.model,
                        revision=r.revision,
                        state=READY,
                        counters=self.counts.get(r.revision, fleet_pb.Counters()),
                    )
                    for m in state.models
                    for r in m.revisions
                ]
            )
        )

    async def serve_until(self, suite: Any, ended: Callable[[pb.Rollout], bool], **bad: Any) -> Any:
        """Requests of both revisions, until the rollout is as wanted."""
        async with asyncio.timeout(30):
            while not ended(found := await rollout(suite)):
                self.count(1, 400)
                self.count(2, **({"succeeded": 20} | bad))
                self.report()
                await asyncio.sleep(0.01)
        return found


async def refusal(call: Any, code: grpc.StatusCode, helpers: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code, caught.value.details()
    return str(helpers.info_of(caught.value).reason)


async def test_the_way_of_a_good_revision(loaded: Any, helpers: Any) -> None:
    server = await loaded.join("i1")
    created = await create(loaded)
    assert (created.name, created.alias, created.base_revision) == (NAME, "production", 1)
    assert created.state == CANARY
    serving = Counting(server)
    ended = await serving.serve_until(loaded, lambda r: r.HasField("end_time"))
    assert (ended.state, ended.step, ended.HasField("error")) == (PROMOTED, 2, False)
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 2)
    assert alias.previous_revision == 1
    state = await server.state_when(
        lambda s: targets_of(s) == {2: 1} and helpers.revisions_of(s) == [2]
    )
    seen = [targets_of(s) for s in server.states if s.version <= state.version]
    steps = [t for i, t in enumerate(seen) if i == 0 or t != seen[i - 1]]
    assert steps == [{1: 1}, {1: 95_000, 2: 5_000}, {1: 50_000, 2: 50_000}, {2: 1}]
    # It was loaded before it got the first request.
    first = next(s for s in server.states if 2 in helpers.revisions_of(s))
    assert targets_of(first) == {1: 1}
    events = await loaded.client.models.ListEvents(pb.ListEventsRequest(model="models/m"))
    of_rollout = [e.action for e in events.events if e.resource == NAME]
    assert of_rollout[::-1] == [
        "ROLLOUT_CREATED",
        "ROLLOUT_STEP",
        "ROLLOUT_STEP",
        "ROLLOUT_STEP",
        "ROLLOUT_PROMOTED",
    ]


@pytest.mark.parametrize(
    ("bad", "reason", "words"),
    [
        ({"succeeded": 16, "failed": 4}, "GATE_ERROR_RATE", "the limit is 0.50%"),
        ({"bucket": 186}, "GATE_LATENCY", "latency of revision 2 is at least"),
    ],
)
async def test_a_bad_revision_is_taken_back(
    loaded: Any, helpers: Any, bad: dict[str, int], reason: str, words: str
) -> None:
    server = await loaded.join("i1")
    await create(loaded, hold=Duration(seconds=60))
    serving = Counting(server)
    ended = await serving.serve_until(loaded, lambda r: r.HasField("end_time"), **bad)
    assert (ended.state, ended.step) == (ROLLED_BACK, 0)
    assert words in ended.error.message
    assert reason in str(ended.error.details[0].value)
    await server.state_when(lambda s: s is server.states[-1] and targets_of(s) == {1: 1})
    await server.state_when(lambda s: s is server.states[-1] and helpers.revisions_of(s) == [1])
    alias = await loaded.client.alias()
    assert (alias.revision, alias.state) == (1, ACTIVE)
    requests = serving.counts[2].succeeded + serving.counts[2].failed
    assert requests < 1000


async def test_what_happened_before_the_step_does_not_count(loaded: Any) -> None:
    server = await loaded.join("i1")
    serving = Counting(server)
    serving.count(1, 1000)
    serving.count(2, 0, failed=1000)
    await create(loaded)
    await server.state_when(lambda s: len(targets_of(s)) == 2)
    ended = await serving.serve_until(loaded, lambda r: r.HasField("end_time"))
    assert ended.state == PROMOTED


async def test_counters_that_begin_again_are_taken_as_they_are(loaded: Any) -> None:
    """A server that restarts has lost nothing of what it reports now."""
    server = await loaded.join("i1")
    await create(loaded, hold=Duration(seconds=60))
    serving = Counting(server)
    await serving.serve_until(loaded, lambda r: serving.counts.get(2, None) is not None)
    await server.state_when(lambda s: len(targets_of(s)) == 2)
    for _ in range(3):
        serving.count(1, 1000)
        serving.count(2, 200)
        serving.report()
    serving.counts.clear()
    ended = await serving.serve_until(
        loaded, lambda r: r.HasField("end_time"), succeeded=10, failed=10
    )
    assert ended.state == ROLLED_BACK
    assert "gate max_error_rate" in ended.error.message


async def test_pause_keeps_the_step_and_resume_goes_on(loaded: Any, helpers: Any) -> None:
    server = await loaded.join("i1")
    await create(loaded)
    await server.state_when(lambda s: len(targets_of(s)) == 2)
    models = loaded.client.models
    paused = (await models.PauseRollout(pb.PauseRolloutRequest(name=NAME))).rollout
    assert paused.state == PAUSED
    serving = Counting(server)
    for _ in range(20):
        serving.count(1, 400)
        serving.count(2, 20)
        serving.report()
        await asyncio.sleep(0.01)
    found = await rollout(loaded)
    assert (found.state, found.step) == (PAUSED, 0)
    stale = models.ResumeRollout(pb.ResumeRolloutRequest(name=NAME, etag="0"))
    assert await refusal(stale, CODE.ABORTED, helpers) == "ETAG_MISMATCH"
    await models.ResumeRollout(pb.ResumeRolloutRequest(name=NAME, etag=found.etag))
    ended = await serving.serve_until(loaded, lambda r: r.HasField("end_time"))
    assert ended.state == PROMOTED


async def test_a_paused_rollout_is_still_guarded(loaded: Any) -> None:
    server = await loaded.join("i1")
    await create(loaded)
    await server.state_when(lambda s: len(targets_of(s)) == 2)
    await loaded.client.models.PauseRollout(pb.PauseRolloutRequest(name=NAME))
    ended = await Counting(server).serve_until(
        loaded, lambda r: r.HasField("end_time"), succeeded=10, failed=10
    )
    assert ended.state == ROLLED_BACK


async def test_promote_and_abort(loaded: Any, helpers: Any) -> None:
    server = await loaded.join("i1")
    models = loaded.client.models
    await create(loaded)
    await server.state_when(lambda s: len(targets_of(s)) == 2)
    aborted = (await models.AbortRollout(pb.AbortRolloutRequest(name=NAME))).rollout
    assert (aborted.state, aborted.HasField("error")) == (ROLLED_BACK, False)
    await server.state_when(lambda s: s is server.states[-1] and targets_of(s) == {1: 1})
    again = models.AbortRollout(pb.AbortRolloutRequest(name=NAME))
    assert await refusal(again, CODE.FAILED_PRECONDITION, helpers) == "ROLLOUT_ENDED"
    second = await create(loaded, 3)
    assert second.name == "models/m/rollouts/2"
    await models.PromoteRollout(pb.PromoteRolloutRequest(name=second.name))
    await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 3)
    listed = await models.ListRollouts(pb.ListRolloutsRequest(parent="models/m", page_size=1))
    assert [(r.name, r.state) for r in listed.rollouts] == [(second.name, PROMOTED)]
    rest = await models.ListRollouts(
        pb.ListRolloutsRequest(parent="models/m", page_token=listed.next_page_token)
    )
    assert [r.name for r in rest.rollouts] == [NAME]


async def test_rollouts_of_all_models_are_listed_in_pages(
    loaded: Any, bundles: Any, helpers: Any
) -> None:
    models = loaded.client.models
    for model in ("a", "gone", "z"):
        for seed in (1, 2):
            await loaded.client.push(helpers.packed(bundles.make(seed)), model)
        await loaded.client.set_alias(1, model)

    async def begin(model: str) -> str:
        made = pb.Rollout(revision=2, steps=[5, 100])
        request = pb.CreateRolloutRequest(parent=f"models/{model}", rollout=made)
        return str((await models.CreateRollout(request, timeout=30)).rollout.name)

    async def listed(**more: Any) -> list[str]:
        found, token = [], ""
        while True:
            request = pb.ListRolloutsRequest(parent="models/-", page_token=token, **more)
            page = await models.ListRollouts(request, timeout=30)
            assert len(page.rollouts) <= (request.page_size or 50)
            found += [each.name for each in page.rollouts]
            token = page.next_page_token
            if not token:
                return found

    ended = await begin("a")
    await models.AbortRollout(pb.AbortRolloutRequest(name=ended))
    running = [await begin(model) for model in ("a", "m", "z")]
    await models.AbortRollout(pb.AbortRolloutRequest(name=await begin("gone")))
    await models.DeleteAlias(pb.DeleteAliasRequest(name="models/gone/aliases/production"))
    await models.DeleteModel(pb.DeleteModelRequest(name="models/gone"))
    assert await listed() == await listed(page_size=1) == [running[0], ended, *running[1:]]
    assert await listed(running_only=True, page_size=2) == running
    page = await models.ListRollouts(pb.ListRolloutsRequest(parent="models/-", page_size=1))
    other = pb.ListRolloutsRequest(parent="models/m", page_token=page.next_page_token)
    said = await refusal(models.ListRollouts(other), CODE.INVALID_ARGUMENT, helpers)
    assert said == "PAGE_TOKEN_INVALID"
    digest, _ = json.loads(base64.urlsafe_b64decode(page.next_page_token))
    for made_up in (["a", "x"], ["a", 2**70], ["a\0", 1], [1, 1]):
        token = base64.urlsafe_b64encode(json.dumps([digest, made_up]).encode()).decode()
        forged = pb.ListRolloutsRequest(parent="models/-", page_size=1, page_token=token)
        said = await refusal(models.ListRollouts(forged), CODE.INVALID_ARGUMENT, helpers)
        assert said == "PAGE_TOKEN_INVALID"


async def test_a_server_that_cannot_load_it_ends_the_rollout(loaded: Any) -> None:
    good = await loaded.join("i1")
    await loaded.join("i2", refuses={("m", 2)})
    await create(loaded)
    async with asyncio.timeout(30):
        while not (ended := await rollout(loaded)).HasField("end_time"):
            await asyncio.sleep(0.01)
    assert ended.state == ROLLED_BACK
    assert "refused by i2: i2 cannot" in ended.error.message
    assert all(targets_of(state) == {1: 1} for state in good.states)


async def test_the_alias_cannot_be_moved_meanwhile(loaded: Any, helpers: Any) -> None:
    await create(loaded)
    models = loaded.client.models
    precondition = CODE.FAILED_PRECONDITION
    moved = models.SetAlias(pb.SetAliasRequest(name=ALIAS, revision=3))
    assert await refusal(moved, precondition, helpers) == "ROLLOUT_RUNNING"
    with pytest.raises(grpc.aio.AioRpcError, match="abort it first"):
        await loaded.client.set_alias(3)
    assert await refusal(create(loaded, 3), precondition, helpers) == "ROLLOUT_RUNNING"
    gone = models.DeleteRevision(pb.DeleteRevisionRequest(name="models/m/revisions/2"))
    assert await refusal(gone, precondition, helpers) == "REVISION_IN_USE"
    # Another alias is free, and without the alias there is nothing left to roll out.
    await loaded.client.set_alias(3, alias="staging")
    await models.DeleteAlias(pb.DeleteAliasRequest(name=ALIAS))
    assert (await rollout(loaded)).state == ROLLED_BACK


async def test_what_cannot_be_a_rollout_is_refused(loaded: Any, helpers: Any, bundles: Any) -> None:
    invalid = CODE.INVALID_ARGUMENT
    for how in (
        {"steps": [5, 50]},
        {"steps": [50, 5, 100]},
        {"steps": [0, 100]},
        {"steps": [float("nan"), 100]},
        {"hold": Duration(seconds=-1)},
        {"gates": pb.RolloutGates(min_requests=-1)},
        {"gates": pb.RolloutGates(max_error_rate=2)},
        {"gates": pb.RolloutGates(max_p99_ratio=0.5)},
    ):
        assert await refusal(create(loaded, **how), invalid, helpers) == "ROLLOUT_INVALID"
    assert await refusal(create(loaded, 0), invalid, helpers) == "NAME_INVALID"
    assert await refusal(create(loaded, 9), CODE.NOT_FOUND, helpers) == "REVISION_NOT_FOUND"
    unknown = create(loaded, alias="other")
    assert await refusal(unknown, CODE.NOT_FOUND, helpers) == "ALIAS_NOT_FOUND"
    precondition = CODE.FAILED_PRECONDITION
    assert await refusal(create(loaded, 1), precondition, helpers) == "ALIAS_THERE"
    await loaded.client.push(bundles.tar(4, size=6))
    assert await refusal(create(loaded, 4), precondition, helpers) == "SIGNATURE_CHANGED"
    get = loaded.client.models.GetRollout
    missing = get(pb.GetRolloutRequest(name=NAME))
    assert await refusal(missing, CODE.NOT_FOUND, helpers) == "ROLLOUT_NOT_FOUND"
    bad = get(pb.GetRolloutRequest(name="models/m/rollouts/x"))
    assert await refusal(bad, invalid, helpers) == "NAME_INVALID"


async def test_a_request_id_begins_one_rollout(loaded: Any) -> None:
    request = pb.CreateRolloutRequest(
        parent="models/m", rollout=pb.Rollout(revision=2), request_id=str(uuid.uuid4())
    )
    first = await loaded.client.models.CreateRollout(request)
    assert await loaded.client.models.CreateRollout(request) == first
    made = first.rollout
    assert list(made.steps) == [5, 25, 50, 100]
    assert made.hold == Duration(seconds=60)
    assert made.gates.min_requests == 200
    assert (made.gates.max_error_rate, made.gates.max_p99_ratio) == (0.005, 1.2)


async def test_it_goes_on_after_a_restart(loaded: Any) -> None:
    server = await loaded.join("i1")
    await create(loaded)
    serving = Counting(server)
    await serving.serve_until(loaded, lambda r: r.step == 1)
    await loaded.restart()
    assert (await rollout(loaded)).step == 1
    server = await loaded.join("i1")
    assert targets_of(server.states[0]) == {1: 50_000, 2: 50_000}
    serving.server = server
    ended = await serving.serve_until(loaded, lambda r: r.HasField("end_time"))
    assert ended.state == PROMOTED
    await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 2)


async def test_a_new_server_that_refuses_the_revision_ends_it(loaded: Any) -> None:
    server = await loaded.join("i1")
    await create(loaded)
    await server.state_when(lambda s: len(targets_of(s)) == 2)
    await loaded.join("i2", refuses={("m", 2)})
    async with asyncio.timeout(30):
        while not (ended := await rollout(loaded)).HasField("end_time"):
            await asyncio.sleep(0.01)
    assert ended.state == ROLLED_BACK
    assert isinstance(ended.error, status_pb2.Status)
    assert "refused by i2" in ended.error.message
