"""Rollouts with shadows: what is asked of the servers, what is judged, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import rollout_shadow

NAME = "models/m/rollouts/1"


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


async def create(suite: Any, revision: int = 2, **more: Any) -> pb.Rollout:
    how: dict[str, Any] = {
        "steps": [50, 100],
        "hold": Duration(nanos=10_000_000),
        "shadow_percent": 10,
        "gates": pb.RolloutGates(min_requests=50, min_agreement=0.95),
    }
    request = pb.CreateRolloutRequest(
        parent="models/m", rollout=pb.Rollout(revision=revision, **(how | more))
    )
    return (await suite.client.models.CreateRollout(request, timeout=30)).rollout


async def rollout(suite: Any) -> pb.Rollout:
    request = pb.GetRolloutRequest(name=NAME)
    return (await suite.client.models.GetRollout(request, timeout=30)).rollout


def shadow_of(state: fleet_pb.DesiredState) -> fleet_pb.Shadow | None:
    route = state.models[0].routes[0]
    return route.shadow if route.HasField("shadow") else None


class Copying:
    """Reports of a server that answers by revision 1 and copies to revision 2."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.base, self.canary = fleet_pb.Counters(), fleet_pb.Counters()

    def report(self, agreed: int, items: int = 20, failed: int = 0) -> None:
        shadow = self.canary.shadow
        shadow.compared += items
        shadow.items += items
        shadow.agreed += agreed
        shadow.failed += failed
        shadow.dropped += 3
        self.base.succeeded += 400
        if len(self.server.states[-1].models[0].routes[0].targets) == 2:
            self.canary.succeeded += 60
        self.server.say(
            report=fleet_pb.Report(
                revisions=[
                    fleet_pb.RevisionStatus(
                        model="m",
                        revision=number,
                        state=fleet_pb.REVISION_STATE_READY,
                        counters=counters,
                    )
                    for number, counters in ((1, self.base), (2, self.canary))
                ]
            )
        )

    async def until(self, suite: Any, ended: Callable[[pb.Rollout], bool], **how: int) -> Any:
        async with asyncio.timeout(30):
            while not ended(found := await rollout(suite)):
                self.report(**({"agreed": 20} | how))
                await asyncio.sleep(0.01)
        return found


async def test_shadows_come_before_the_first_request_and_go_on_beside_them(loaded: Any) -> None:
    server = await loaded.join("i1")
    created = await create(loaded)
    assert (created.state, created.step) == (pb.Rollout.STATE_SHADOW, -1)
    assert (created.shadow_percent, created.gates.min_agreement) == (10, 0.95)
    state = await server.state_when(lambda s: shadow_of(s) is not None)
    assert shadow_of(state) == fleet_pb.Shadow(
        revision=2, base_revision=1, share_ppm=100_000, output="scores"
    )
    assert [t.revision for t in state.models[0].routes[0].targets] == [1]
    copying = Copying(server)
    found = await copying.until(loaded, lambda r: r.evidence.shadow.compared >= 20)
    assert found.evidence.shadow.dropped > 0
    ended = await copying.until(loaded, lambda r: r.HasField("end_time"))
    assert ended.state == pb.Rollout.STATE_PROMOTED
    both = await server.state_when(lambda s: len(s.models[0].routes[0].targets) == 2)
    assert shadow_of(both) is not None
    await server.state_when(lambda s: s.models[0].routes[0].targets[0].revision == 2)
    assert shadow_of(server.states[-1]) is None


@pytest.mark.parametrize(
    ("how", "gate", "words"),
    [
        ({"agreed": 12}, "min_agreement", "gives the answer of revision 1 for"),
        ({"agreed": 20, "failed": 5}, "max_error_rate", "shadows"),
    ],
)
async def test_a_revision_whose_shadows_are_bad_never_gets_a_request(
    loaded: Any, how: dict[str, int], gate: str, words: str
) -> None:
    server = await loaded.join("i1")
    await create(loaded, hold=Duration(seconds=60))
    await server.state_when(lambda s: shadow_of(s) is not None)
    ended = await Copying(server).until(loaded, lambda r: r.HasField("end_time"), **how)
    assert (ended.state, ended.step) == (pb.Rollout.STATE_ROLLED_BACK, -1)
    assert ended.error.message.startswith(f"gate {gate}: ")
    assert words in ended.error.message
    states = {g.gate: g.state for g in ended.evidence.gates}
    assert states[gate] == pb.GateEvidence.STATE_FAILED
    assert all(len(s.models[0].routes[0].targets) == 1 for s in server.states)
    await server.state_when(lambda s: s is server.states[-1] and shadow_of(s) is None)


async def test_pause_and_promote_in_the_step_of_shadows(loaded: Any) -> None:
    server = await loaded.join("i1")
    await create(loaded, hold=Duration(seconds=60))
    await server.state_when(lambda s: shadow_of(s) is not None)
    models = loaded.client.models
    assert (await models.PauseRollout(pb.PauseRolloutRequest(name=NAME))).rollout.state == 3
    resumed = (await models.ResumeRollout(pb.ResumeRolloutRequest(name=NAME))).rollout
    assert resumed.state == pb.Rollout.STATE_SHADOW
    await models.PromoteRollout(pb.PromoteRolloutRequest(name=NAME))
    await loaded.client.alias_when(lambda a: a.revision == 2)


async def test_what_cannot_be_compared_is_refused_with_what_to_do(
    loaded: Any, helpers: Any, bundles: Any
) -> None:
    async def refused(why: str, words: str, **how: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
            await create(loaded, **how)
        assert helpers.info_of(caught.value).reason == why

    gates = pb.RolloutGates()
    await refused("AGREEMENT_UNKNOWN", "give a number, such as --min-agreement 95%", gates=gates)
    await refused("ROLLOUT_INVALID", "needs shadows", shadow_percent=0)
    await refused("ROLLOUT_INVALID", "must be 0 for no shadows", shadow_percent=101)
    gates = pb.RolloutGates(min_agreement=1.5)
    await refused("ROLLOUT_INVALID", "must be 0 to 1", gates=gates)
    five = {"says": helpers.manifest(classes=5), "model": helpers.graph(5, classes=5)}
    await loaded.client.push(bundles.tar(5, **five))
    await refused("SHADOW_NOT_COMPARABLE", "cannot be compared", revision=4)


def bundle(agreement: float | None = None, parent: str = "p", **step: int) -> bundle_pb2.Manifest:
    made = bundle_pb2.Manifest(
        outputs=[
            bundle_pb2.TensorSpec(
                name="scores", data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, 10]
            )
        ],
        variants=[bundle_pb2.Variant(name="cpu-fp32")],
        provenance=bundle_pb2.Provenance(parent_digest=parent),
        preprocess=[bundle_pb2.PreprocessStep(rotate=bundle_pb2.Rotate(**step))],
    )
    if agreement is not None:
        made.variants[0].measurement.agreement.value = agreement
    return made


def test_the_measured_agreement_is_taken_less_two_points() -> None:
    found = rollout_shadow.compare(2, bundle(0.98), 1, bundle(), None)
    assert found.min_agreement == pytest.approx(0.96)
    # Two that were made from one parent may differ from it in different places.
    found = rollout_shadow.compare(2, bundle(0.98), 1, bundle(0.97), None)
    assert found.min_agreement == pytest.approx(0.93)
    assert rollout_shadow.compare(2, bundle(0.98), 1, bundle(), 0.5).min_agreement == 0.5
    with pytest.raises(Exception, match="parent from which revision 1 was not made"):
        rollout_shadow.compare(2, bundle(0.98), 1, bundle(parent="q"), None)


def test_other_preprocessing_is_noticed() -> None:
    same = rollout_shadow.compare(2, bundle(0.98), 1, bundle(), 0.9)
    assert not same.transform_again
    other = rollout_shadow.compare(2, bundle(0.98, quarter_turns=1), 1, bundle(), 0.9)
    assert other.transform_again
