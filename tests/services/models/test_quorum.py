"""A minority that refuses a revision stops the switch, unless a quorum allows to go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models.fleet_view import Loading
from pollard.services.models.quorum import Quorum, Verdict, judge

PREPROCESS = fleet_pb.SERVER_KIND_PREPROCESS
READY = fleet_pb.REVISION_STATE_READY
LOADING = fleet_pb.REVISION_STATE_LOADING
FAILED = fleet_pb.REVISION_STATE_FAILED
ACTIVE = pb.Alias.STATE_ACTIVE
TWO_THIRDS = pb.Quorum(share=2 / 3)


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


async def fleet_of(suite: Any, refuses: int = 2, **more: Any) -> dict[str, Any]:
    """Three inference servers, of which `bad` refuses a revision, and a preprocess server."""
    return {
        "a": await suite.join("a"),
        "b": await suite.join("b"),
        "bad": await suite.join("bad", refuses={("m", refuses)}, **more),
        "pre": await suite.join("pre", kind=PREPROCESS),
    }


def refused_by(state: fleet_pb.DesiredState) -> dict[str, list[tuple[str, int]]]:
    return {
        endpoint.server_id: [(item.model, item.revision) for item in endpoint.refused]
        for endpoint in state.inference_endpoints
    }


def servers_of(alias: pb.Alias) -> list[str]:
    return [failure.server_id for failure in alias.failures]


@pytest.mark.parametrize(
    ("quorum", "count", "needed"),
    [
        (Quorum(share=2 / 3), 3, 2),
        (Quorum(share=2 / 3), 4, 3),
        (Quorum(share=0.5), 3, 2),
        (Quorum(share=0.01), 3, 1),
        (Quorum(share=1.0), 3, 3),
        (Quorum(servers=2), 3, 2),
        (Quorum(servers=5), 3, 5),
    ],
)
def test_shares_are_rounded_up_to_servers(quorum: Quorum, count: int, needed: int) -> None:
    assert quorum.needed(count) == needed
    assert Quorum.of(quorum.stored()) == quorum
    assert Quorum.decode(quorum.encode()) == quorum


@pytest.mark.parametrize(
    ("refusing", "waiting", "quorum", "verdict", "late"),
    [
        ("", "", None, Verdict.GO, Verdict.GO),
        ("", "c", None, Verdict.WAIT, Verdict.REFUSED),
        ("c", "", None, Verdict.REFUSED, Verdict.REFUSED),
        ("c", "", Quorum(servers=2), Verdict.GO, Verdict.GO),
        ("c", "", Quorum(servers=3), Verdict.REFUSED, Verdict.REFUSED),
        ("c", "b", Quorum(servers=2), Verdict.WAIT, Verdict.REFUSED),
        ("c", "b", Quorum(servers=1), Verdict.WAIT, Verdict.GO),
        ("bc", "a", Quorum(servers=2), Verdict.REFUSED, Verdict.REFUSED),
        ("abc", "", Quorum(servers=1), Verdict.REFUSED, Verdict.REFUSED),
        ("p", "", Quorum(servers=1), Verdict.REFUSED, Verdict.REFUSED),
        ("", "p", Quorum(servers=1), Verdict.WAIT, Verdict.REFUSED),
    ],
)
def test_what_follows_from_what_the_servers_say(
    refusing: str, waiting: str, quorum: Quorum | None, verdict: Verdict, late: Verdict
) -> None:
    """Of the inference servers a, b and c, and the preprocess server p."""
    why = status_pb2.Status(message="why")
    loading = Loading(dict.fromkeys(refusing, why), list(waiting), frozenset("abc"))
    assert judge(loading, quorum)[0] is verdict
    found, refusals = judge(loading, quorum, late=why)
    assert found is late
    assert set(refusals) == set(refusing + waiting)


async def test_a_minority_that_refuses_is_left_behind_and_shown(loaded: Any, helpers: Any) -> None:
    servers = await fleet_of(loaded)
    await loaded.client.set_alias(2, quorum=TWO_THIRDS)
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    assert (alias.revision, alias.previous_revision) == (2, 1)
    assert servers_of(alias) == ["bad"]
    assert alias.failures[0].status.message == "bad cannot"
    assert alias.quorum.share == pytest.approx(2 / 3)
    # Preprocess servers learn with the routes which server to pass over, and never without.
    for state in servers["pre"].states:
        if helpers.route_of(state) == 2:
            assert refused_by(state) == {"a": [], "b": [], "bad": [("m", 2)]}
    # Its refusals hold nothing up: the old revision is freed where it is no longer used.
    for server in servers.values():
        await server.state_when(lambda s: helpers.revisions_of(s) == [2])
    events = await loaded.client.models.ListEvents(pb.ListEventsRequest(model="models/m"))
    said = [f"{event.action}: {event.detail}" for event in reversed(events.events)]
    assert [line for line in said if line.startswith("ALIAS_")][-3:] == [
        "ALIAS_SET: to revision 2 from 1, as soon as 66.67 % of the inference servers have it",
        "ALIAS_SWITCHED: from revision 1 to 2, without bad",
        "ALIAS_ACTIVE: every server sends requests to revision 2, except bad",
    ]


async def test_a_server_that_tries_again_with_every_state_causes_no_new_states(
    loaded: Any, helpers: Any
) -> None:
    servers = await fleet_of(loaded, automatic=False)
    bad = servers["bad"]

    async def stubborn() -> None:
        """Loads again and again, as inference servers do."""
        answered = 0
        while True:
            await bad.state_when(lambda _, seen=answered: len(bad.states) > seen)
            answered = len(bad.states)
            state = bad.states[-1]
            first = [("m", 1, READY)]
            if 2 not in helpers.revisions_of(state):
                bad.report(*first)
                bad.ack(state)
                continue
            bad.report(*first, ("m", 2, LOADING))
            await asyncio.sleep(0.02)
            bad.report(*first, ("m", 2, FAILED))
            bad.nack(state, "does not fit")

    trying = asyncio.create_task(stubborn())
    await loaded.client.set_alias(2, quorum=pb.Quorum(servers=2))
    await servers["pre"].state_when(lambda s: helpers.revisions_of(s) == [2])
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    versions = len(servers["pre"].states)
    await asyncio.sleep(0.5)
    assert len(servers["pre"].states) == versions
    assert servers_of(await loaded.client.alias()) == ["bad"]
    assert (await loaded.client.alias()).etag == alias.etag
    trying.cancel()


async def test_too_few_leave_the_routes_and_the_words_say_how_many(loaded: Any) -> None:
    await fleet_of(loaded)
    await loaded.client.set_alias(2, quorum=pb.Quorum(servers=3))
    alias = await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
    assert alias.revision == 1
    assert "2 of 3 inference servers can run it, and the quorum of 3 asks for 3" in (
        alias.error.message
    )
    # And it can be tried again with a smaller one.
    await loaded.client.set_alias(2, quorum=pb.Quorum(servers=1))
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    assert alias.revision == 2


async def test_a_preprocess_server_is_never_excused(loaded: Any) -> None:
    await loaded.join("a")
    await loaded.join("pre", kind=PREPROCESS, refuses={("m", 2)})
    await loaded.client.set_alias(2, quorum=pb.Quorum(servers=1))
    alias = await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
    assert servers_of(alias) == ["pre"]
    assert "no quorum excuses a preprocess server" in alias.error.message


async def test_servers_that_are_not_ready_in_time_are_left_behind_too(
    suite_with: Callable[..., Any], helpers: Any
) -> None:
    async with suite_with(stocked=True, load_timeout_seconds=0.5) as suite:
        await suite.join("a")
        slow = await suite.join("slow", automatic=False)
        slow.report(("m", 1, READY))
        slow.ack(slow.states[-1])
        await suite.client.set_alias(2, quorum=pb.Quorum(share=0.5))
        state = await slow.state_when(lambda s: helpers.route_of(s) == 2)
        alias = await suite.client.alias()
        assert servers_of(alias) == ["slow"]
        assert "was not ready on slow within 0.5 s" in alias.failures[0].status.message
        # It gets there in the end.
        slow.report(("m", 1, READY), ("m", 2, READY))
        slow.ack(slow.states[-1])
        await suite.client.alias_when(lambda a: a.state == ACTIVE and not a.failures)
        assert refused_by(state) == {}  # inference servers are told of no others


async def test_a_server_that_can_after_all_gets_requests_again(loaded: Any, helpers: Any) -> None:
    servers = await fleet_of(loaded)
    await loaded.client.set_alias(2, quorum=TWO_THIRDS)
    shown = await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    await servers["pre"].state_when(lambda s: helpers.revisions_of(s) == [2])
    bad = servers["bad"]
    bad.refuses.clear()  # the next states find it able as well
    bad.report(("m", 2, READY))
    bad.ack(bad.states[-1])
    alias = await loaded.client.alias_when(lambda a: not a.failures)
    assert (alias.state, alias.revision) == (ACTIVE, 2)
    assert alias.etag != shown.etag
    await servers["pre"].state_when(
        lambda s: (
            helpers.revisions_of(s) == [2]
            and refused_by(s) == {name: [] for name in ("a", "b", "bad")}
        )
    )
    events = await loaded.client.models.ListEvents(pb.ListEventsRequest(page_size=1))
    assert events.events[0].action == "ALIAS_ACCEPTED"
    assert events.events[0].detail == "revision 2 is no longer refused by bad"


async def test_refusals_outlive_the_manager(loaded: Any, helpers: Any) -> None:
    await fleet_of(loaded)
    await loaded.client.set_alias(2, quorum=TWO_THIRDS)
    await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    await loaded.restart()
    # Before it has heard from any server.
    assert servers_of(await loaded.client.alias()) == ["bad"]
    again = await fleet_of(loaded)
    state = await again["pre"].state_when(lambda s: len(s.inference_endpoints) == 3)
    assert refused_by(state)["bad"] == [("m", 2)]
    # Whoever is gone for good is no longer shown.
    await again["bad"].close()
    await loaded.client.alias_when(lambda a: not a.failures)


async def test_a_server_that_joins_and_cannot_run_production_is_shown_and_holds_nothing_up(
    loaded: Any, helpers: Any
) -> None:
    first = await loaded.join("a")
    await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    await loaded.join("weak", refuses={("m", 1)})
    alias = await loaded.client.alias_when(lambda a: bool(a.failures))
    assert (servers_of(alias), alias.state) == (["weak"], ACTIVE)
    # A revision that both can run goes out as ever.
    await loaded.client.set_alias(2)
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 2)
    assert servers_of(alias) == []
    await first.state_when(lambda s: helpers.revisions_of(s) == [2])


async def test_going_back_can_have_a_quorum_too(loaded: Any) -> None:
    await fleet_of(loaded, refuses=1)
    await loaded.client.set_alias(2)
    await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 2)
    name = "models/m/aliases/production"
    await loaded.client.models.RollbackAlias(pb.RollbackAliasRequest(name=name))
    alias = await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
    assert alias.revision == 2
    request = pb.RollbackAliasRequest(name=name, quorum=pb.Quorum(share=0.5))
    await loaded.client.models.RollbackAlias(request)
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 1)
    assert servers_of(alias) == ["bad"]


async def test_a_switch_on_its_way_can_be_given_another_quorum(loaded: Any) -> None:
    await loaded.join("a")
    slow = await loaded.join("slow", automatic=False)
    await loaded.client.set_alias(2)
    before = await loaded.client.alias()
    after = await loaded.client.set_alias(2, quorum=pb.Quorum(servers=1))
    assert after.etag != before.etag
    assert after.state == pb.Alias.STATE_LOADING
    slow.report(("m", 1, READY), ("m", 2, FAILED))
    slow.nack(slow.states[-1])
    alias = await loaded.client.alias_when(lambda a: a.revision == 2)
    assert servers_of(alias) == ["slow"]


@pytest.mark.parametrize(
    ("quorum", "called"),
    [
        (pb.Quorum(), "0 servers"),
        (pb.Quorum(servers=-1), "-1 servers"),
        (pb.Quorum(share=1.5), "a share of 1.5"),
        (pb.Quorum(share=-0.1), "a share of -0.1"),
    ],
)
async def test_what_is_no_quorum_is_refused(
    loaded: Any, helpers: Any, quorum: pb.Quorum, called: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loaded.client.set_alias(2, quorum=quorum)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert helpers.info_of(caught.value).reason == "QUORUM_INVALID"
    assert f"a quorum of {called} is none" in caught.value.details()
