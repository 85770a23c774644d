"""The switch of an alias across the suite, with servers on real Sync streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import fleet
from pollard.services.models.events import DAY_US
from pollard.services.models.schema import Server
from pollard.services.models.store import Store

PREPROCESS = fleet_pb.SERVER_KIND_PREPROCESS
READY = fleet_pb.REVISION_STATE_READY
LOADING = fleet_pb.REVISION_STATE_LOADING
FAILED = fleet_pb.REVISION_STATE_FAILED
ACTIVE = pb.Alias.STATE_ACTIVE


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


async def settle(server: Any) -> fleet_pb.DesiredState:
    """Answer the newest state by hand: everything in it is ready."""
    state = server.states[-1]
    server.report(*((m.model, r.revision, READY) for m in state.models for r in m.revisions))
    server.ack(state)
    return state  # type: ignore[no-any-return]  # a helper of the conftest


async def heard(suite: Any, helpers: Any, server_id: str) -> None:
    """Wait until the manager has heard all that a server said of its first state.

    When a stream ends while its client still writes, grpc's asyncio client may tell INTERNAL,
    "Internal error from Core", in place of the status that it was ended with (grpc/grpc#36066).
    """
    await helpers.eventually(lambda: suite.client.server(server_id), lambda s: s.acked_version > 0)


async def never(condition: Callable[[], bool], seconds: float = 0.3) -> None:
    """Nothing of the kind happens for a while."""
    await asyncio.sleep(seconds)
    assert not condition()


async def test_without_any_server_the_routes_change_at_once(loaded: Any) -> None:
    await loaded.client.set_alias(2)
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    assert (alias.revision, alias.previous_revision) == (2, 1)


async def test_make_before_break(loaded: Any, helpers: Any) -> None:
    """Each step happens only after every server has taken the one before."""
    infer = [await loaded.join(f"i{n}", automatic=False) for n in (1, 2)]
    pre = [await loaded.join(f"p{n}", automatic=False, kind=PREPROCESS) for n in (1, 2)]
    for server in [*infer, *pre]:
        await settle(server)
    await helpers.eventually(lambda: loaded.client.server("p2"), lambda s: s.acked_version > 0)
    await loaded.client.set_alias(2)
    everyone = [*infer, *pre]
    for server in everyone:
        state = await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
        assert helpers.route_of(state) == 1

    def changed() -> bool:
        return any(helpers.route_of(s) == 2 for server in everyone for s in server.states)

    # One inference server is ready, the other not.
    await settle(infer[0])
    for server in pre:
        await settle(server)
    infer[1].report(("m", 1, READY), ("m", 2, LOADING))
    await never(changed)
    assert (await loaded.client.alias()).state == pb.Alias.STATE_LOADING
    infer[1].report(("m", 1, READY), ("m", 2, READY))
    for server in everyone:
        state = await server.state_when(lambda s: helpers.route_of(s) == 2)
        assert helpers.revisions_of(state) == [1, 2]
    alias = await loaded.client.alias()
    assert (alias.state, alias.revision) == (pb.Alias.STATE_SWITCHING, 2)

    # One preprocess server has not taken the new routes: nothing is freed.
    for server in [*infer, pre[0]]:
        await settle(server)
    await never(
        lambda: any(helpers.revisions_of(s) == [2] for x in everyone for s in x.states), 0.5
    )
    assert (await loaded.client.alias()).state == pb.Alias.STATE_SWITCHING
    await settle(pre[1])
    await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    for server in everyone:
        await server.state_when(lambda s: helpers.revisions_of(s) == [2])
    versions = [state.version for state in pre[0].states]
    assert versions == sorted(set(versions))


async def test_the_old_revision_stays_for_the_drain_time(
    suite_with: Callable[..., Any], helpers: Any
) -> None:
    async with suite_with(stocked=True, drain_seconds=3600) as suite:
        server = await suite.join("i")
        await suite.client.set_alias(2)
        await suite.client.alias_when(lambda a: a.state == ACTIVE)
        await never(lambda: helpers.revisions_of(server.states[-1]) != [1, 2])
        # And after a restart of the manager it is still there.
        await suite.restart()
        again = await suite.join("i")
        assert helpers.revisions_of(again.states[-1]) == [1, 2]
        assert helpers.route_of(again.states[-1]) == 2


async def test_a_refusal_leaves_the_routes_and_names_the_servers(loaded: Any, helpers: Any) -> None:
    good = await loaded.join("good")
    bad = [await loaded.join(name, refuses={("m", 2)}) for name in ("bad1",)]
    pre = await loaded.join("pre", kind=PREPROCESS)
    await loaded.client.set_alias(2)
    alias = await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
    assert (alias.revision, alias.pending_revision) == (1, 0)
    assert [failure.server_id for failure in alias.failures] == ["bad1"]
    assert alias.failures[0].status.message == "bad1 cannot"
    assert "bad1" in alias.error.message
    for server in [good, *bad, pre]:
        await server.state_when(
            lambda s, server=server: s is server.states[-1] and helpers.revisions_of(s) == [1]
        )
        assert all(helpers.route_of(state) == 1 for state in server.states)
    listed = await loaded.client.server("bad1")
    assert listed.connected
    # Trying again after the cause is gone works, old reports notwithstanding.
    bad[0].refuses.clear()
    await loaded.client.set_alias(2)
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    assert (alias.revision, len(alias.failures)) == (2, 0)
    assert not alias.HasField("error")


async def test_a_nack_is_shown_until_the_next_ack(loaded: Any, helpers: Any) -> None:
    server = await loaded.join("i", automatic=False)
    server.nack(server.states[-1], "out of memory")
    shown = await helpers.eventually(
        lambda: loaded.client.server("i"), lambda s: s.HasField("last_nack")
    )
    assert shown.last_nack.status.message == "out of memory"
    await settle(server)
    await helpers.eventually(
        lambda: loaded.client.server("i"), lambda s: not s.HasField("last_nack")
    )


async def test_a_preprocess_server_without_reports_can_refuse_too(loaded: Any) -> None:
    await loaded.join("i")
    pre = await loaded.join("pre", kind=PREPROCESS, automatic=False)
    pre.ack(pre.states[-1])
    await loaded.client.set_alias(2)
    state = await pre.state_when(lambda s: len(s.models[0].revisions) == 2)
    pre.nack(state, "cannot fetch the manifest")
    alias = await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
    assert [failure.server_id for failure in alias.failures] == ["pre"]


async def test_an_alias_that_fails_does_not_hold_up_another(
    loaded: Any, bundles: Any, helpers: Any
) -> None:
    """A server that cannot run one model moves along with the others."""
    await loaded.client.push(bundles.tar(1), "n")
    server = await loaded.join("i", automatic=False)
    await settle(server)
    await loaded.client.set_alias(1, "n")
    await loaded.client.set_alias(2)
    state = await server.state_when(
        lambda s: helpers.revisions_of(s) == [1, 2] and helpers.revisions_of(s, "n") == [1]
    )
    server.report(("m", 1, READY), ("m", 2, READY), ("n", 1, FAILED))
    server.nack(state, "n does not run")
    await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED, "n")
    state = await server.state_when(lambda s: helpers.route_of(s) == 2)
    # Even while every answer is a refusal, the reports tell that `m` is as wanted.
    server.nack(state, "still something else")
    server.report(("m", 1, READY), ("m", 2, READY))
    await loaded.client.alias_when(lambda a: a.state == ACTIVE)


async def test_a_newer_order_overtakes_an_unfinished_one(loaded: Any, helpers: Any) -> None:
    server = await loaded.join("i", automatic=False)
    await settle(server)
    await loaded.client.set_alias(2)
    await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
    await loaded.client.set_alias(3)
    await server.state_when(lambda s: helpers.revisions_of(s) == [1, 3])
    server.report(("m", 1, READY), ("m", 2, READY))
    await never(lambda: any(helpers.route_of(s) == 2 for s in server.states))
    await settle(server)
    await server.state_when(lambda s: helpers.route_of(s) == 3)
    await settle(server)
    alias = await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    assert (alias.revision, alias.previous_revision) == (3, 1)


async def test_going_back_to_the_current_revision_gives_up_the_switch(
    loaded: Any, helpers: Any
) -> None:
    server = await loaded.join("i", automatic=False)
    await settle(server)
    await loaded.client.set_alias(2)
    await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
    request = pb.RollbackAliasRequest(name="models/m/aliases/production")
    await loaded.client.models.RollbackAlias(request)
    alias = await loaded.client.alias_when(lambda a: a.pending_revision == 0)
    assert alias.revision == 1
    await server.state_when(lambda s: s is server.states[-1] and helpers.revisions_of(s) == [1])
    await settle(server)
    await loaded.client.alias_when(lambda a: a.state == ACTIVE)


async def test_rollback_goes_to_the_revision_before_and_back(loaded: Any) -> None:
    await loaded.join("i")
    await loaded.join("p", kind=PREPROCESS)
    request = pb.RollbackAliasRequest(name="models/m/aliases/production")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await loaded.client.models.RollbackAlias(request)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await loaded.client.set_alias(2)
    await loaded.client.alias_when(lambda a: a.state == ACTIVE and a.revision == 2)
    for expected in (1, 2, 1):
        await loaded.client.models.RollbackAlias(request)
        await loaded.client.alias_when(
            lambda a, expected=expected: a.state == ACTIVE and a.revision == expected
        )


async def test_old_news_of_an_earlier_load_are_not_believed(loaded: Any, helpers: Any) -> None:
    """A report from before the server freed the revision says nothing of the new load."""
    server = await loaded.join("i", automatic=False)
    await settle(server)
    for target in (2, 1):
        await loaded.client.set_alias(target)
        await server.state_when(
            lambda s, target=target: (
                s is server.states[-1]
                and helpers.revisions_of(s) == [1, 2]
                and helpers.route_of(s) != target
            )
        )
        await settle(server)
        await server.state_when(
            lambda s, target=target: s is server.states[-1] and helpers.route_of(s) == target
        )
        await settle(server)
        await server.state_when(
            lambda s, target=target: s is server.states[-1] and helpers.revisions_of(s) == [target]
        )
        if target == 2:
            await settle(server)
    # Revision 2 was freed by the last state, which the server has not answered.
    await loaded.client.set_alias(2)
    state = await server.state_when(
        lambda s: s is server.states[-1] and helpers.revisions_of(s) == [1, 2]
    )
    server.report(("m", 1, READY), ("m", 2, READY))
    await never(lambda: helpers.route_of(server.states[-1]) == 2)
    server.ack(state)
    await server.state_when(lambda s: s is server.states[-1] and helpers.route_of(s) == 2)


async def test_a_switch_waits_for_a_crashed_server_up_to_its_lease(
    suite_with: Callable[..., Any], helpers: Any
) -> None:
    async with suite_with(stocked=True, server_lease_seconds=1.0) as suite:
        alive, crashed = await suite.join("alive"), await suite.join("crashed")
        await crashed.close()
        await helpers.eventually(lambda: suite.client.server("crashed"), lambda s: not s.connected)
        await suite.client.set_alias(2)
        await alive.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
        assert (await suite.client.alias()).state == pb.Alias.STATE_LOADING
        await suite.client.alias_when(lambda a: a.state == ACTIVE)
        shown = await suite.client.server("crashed")
        assert shown.HasField("last_seen_time")


async def test_a_server_that_returns_within_its_lease_is_waited_for(
    suite_with: Callable[..., Any], helpers: Any
) -> None:
    async with suite_with(stocked=True, server_lease_seconds=3600) as suite:
        crashed = await suite.join("crashed")
        await crashed.close()
        await suite.client.set_alias(2)
        await asyncio.sleep(0.3)
        assert (await suite.client.alias()).state == pb.Alias.STATE_LOADING
        await suite.join("crashed")
        await suite.client.alias_when(lambda a: a.state == ACTIVE)


async def test_a_restarted_manager_waits_for_the_servers_it_knew_and_goes_on(
    suite_with: Callable[..., Any], helpers: Any
) -> None:
    async with suite_with(stocked=True, server_lease_seconds=3600) as suite:
        server = await suite.join("i", automatic=False)
        await settle(server)
        await suite.client.set_alias(2)
        loading = await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
        await suite.restart()
        alias = await suite.client.alias()
        assert (alias.state, alias.pending_revision) == (pb.Alias.STATE_LOADING, 2)
        await asyncio.sleep(0.3)
        assert (await suite.client.alias()).state == pb.Alias.STATE_LOADING
        again = await suite.join("i", automatic=False)
        assert again.states[0].version >= loading.version
        assert helpers.revisions_of(again.states[0]) == [1, 2]
        await settle(again)
        routed = await again.state_when(lambda s: helpers.route_of(s) == 2)
        # In the middle of the switch, again.
        await suite.restart()
        assert (await suite.client.alias()).state == pb.Alias.STATE_SWITCHING
        last = await suite.join("i")
        assert last.states[0].version >= routed.version
        assert helpers.route_of(last.states[0]) == 2
        assert helpers.revisions_of(last.states[0]) == [1, 2]
        await suite.client.alias_when(lambda a: a.state == ACTIVE)
        await last.state_when(lambda s: helpers.revisions_of(s) == [2])


async def test_a_server_that_was_connected_for_days_is_waited_for_after_a_kill(
    suite_with: Callable[..., Any], helpers: Any
) -> None:
    async with suite_with(stocked=True, server_lease_seconds=3600) as suite:
        for name in ("quiet", "gone"):
            await settle(await suite.join(name, automatic=False))
            await heard(suite, helpers, name)
        await suite.stop()
        # As a manager leaves it that was killed: what it wrote last of a server that has been
        # connected ever since is two days old; of one that has gone, too.
        store = Store(suite.settings.store, suite.settings.database_url)
        store.open()

        def as_killed(session: Session) -> None:
            for row in session.scalars(select(Server)):
                row.last_seen_time -= 2 * DAY_US
                row.present = row.server_id == "quiet"

        store.write_now(as_killed)
        store.close()
        await suite.start()
        assert (await suite.client.server("quiet")).name
        assert not (await suite.client.server("gone")).name
        await suite.client.set_alias(2)
        await asyncio.sleep(0.3)
        assert (await suite.client.alias()).state == pb.Alias.STATE_LOADING
        await suite.join("quiet")
        await suite.client.alias_when(lambda a: a.state == ACTIVE)


async def test_that_a_quiet_server_is_still_there_is_written_down(
    suite_with: Callable[..., Any], helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "SEEN_US", 0)
    async with suite_with(stocked=True, server_lease_seconds=0.5, report_interval_seconds=0.1) as (
        suite
    ):

        def seen() -> int:
            def work(session: Session) -> int:
                return session.get_one(Server, "quiet").last_seen_time

            return int(suite.service.store.read_now(work))

        server = await suite.join("quiet", automatic=False)
        await settle(server)
        await heard(suite, helpers, "quiet")
        before = seen()
        # Only reports, and all of them the same.
        async with asyncio.timeout(20):
            while seen() <= before:
                state = server.states[-1]
                server.report(
                    *((m.model, r.revision, READY) for m in state.models for r in m.revisions)
                )
                await asyncio.sleep(0.05)


async def test_a_load_that_never_ends_fails_the_switch(suite_with: Callable[..., Any]) -> None:
    async with suite_with(stocked=True, load_timeout_seconds=0.5) as suite:
        server = await suite.join("silent", automatic=False)
        await settle(server)
        await suite.client.set_alias(2)
        alias = await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
        assert alias.revision == 1
        assert [failure.server_id for failure in alias.failures] == ["silent"]
        assert "silent" in alias.error.message


async def test_a_second_stream_replaces_the_first(loaded: Any, helpers: Any) -> None:
    first = await loaded.join("twin")
    await heard(loaded, helpers, "twin")
    second = await loaded.join("twin")
    assert await first.ended() == grpc.StatusCode.ABORTED
    await loaded.client.set_alias(2)
    await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    assert second.status is None


async def test_a_stopping_manager_ends_the_streams_in_good_order(suite: Any, helpers: Any) -> None:
    server = await suite.join("i")
    await heard(suite, helpers, "i")
    await suite.service.stop(5)
    suite.service = None
    assert await server.ended() == grpc.StatusCode.UNAVAILABLE
    assert "stopping" in server.details


async def test_a_silent_stream_is_ended(suite_with: Callable[..., Any], helpers: Any) -> None:
    async with suite_with(report_interval_seconds=0.3, server_lease_seconds=1.0) as suite:
        server = await suite.join("quiet", automatic=False)
        assert server.states[0].report_interval.ToMilliseconds() == 300
        assert await server.ended() == grpc.StatusCode.UNAVAILABLE
        await helpers.eventually(lambda: suite.client.server("quiet"), lambda s: not s.connected)


@pytest.mark.parametrize(
    "first",
    [
        fleet_pb.SyncRequest(),
        fleet_pb.SyncRequest(ack=fleet_pb.Ack(version=1)),
        fleet_pb.SyncRequest(hello=fleet_pb.Hello()),
        fleet_pb.SyncRequest(hello=fleet_pb.Hello(server_id="x", address="a:1")),
        fleet_pb.SyncRequest(hello=fleet_pb.Hello(server_id="x", kind=1)),
        fleet_pb.SyncRequest(hello=fleet_pb.Hello(server_id="x" * 129, kind=2)),
        fleet_pb.SyncRequest(hello=fleet_pb.Hello(server_id="x y", kind=2)),
        fleet_pb.SyncRequest(hello=fleet_pb.Hello(server_id="x", kind=2, applied_version=-1)),
        fleet_pb.SyncRequest(hello=fleet_pb.Hello(server_id="x", kind=2, applied_version=2**62)),
    ],
)
async def test_a_bad_beginning_of_a_stream_is_refused(
    suite: Any, helpers: Any, first: fleet_pb.SyncRequest
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in suite.client.fleet.Sync(iter([first])):
            pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert helpers.info_of(caught.value).reason
    assert not (await suite.client.fleet.ListServers(fleet_pb.ListServersRequest())).servers


async def test_a_second_hello_ends_the_stream(suite: Any) -> None:
    server = await suite.join("i")
    server.say(hello=fleet_pb.Hello(server_id="j", kind=2))
    assert await server.ended() == grpc.StatusCode.INVALID_ARGUMENT


async def test_answers_to_unknown_states_change_nothing(loaded: Any, helpers: Any) -> None:
    server = await loaded.join("i", automatic=False)
    server.say(ack=fleet_pb.Ack(version=10_000, nonce="made up"))
    server.say(ack=fleet_pb.Ack(version=server.states[-1].version, nonce="made up"))
    server.report()
    await helpers.eventually(lambda: loaded.client.server("i"), lambda s: s.HasField("report"))
    assert (await loaded.client.server("i")).acked_version == 0


async def test_versions_grow_beyond_what_any_server_has_seen(suite: Any) -> None:
    await suite.join("old-hand", applied_version=41)
    newcomer = await suite.join("newcomer")
    state = await newcomer.state_when(lambda s: s.version > 41)
    await suite.restart()
    again = await suite.join("newcomer")
    assert again.states[-1].version >= state.version


async def test_preprocess_servers_learn_only_of_inference_servers_that_answered(
    suite: Any, helpers: Any
) -> None:
    def ids(state: fleet_pb.DesiredState) -> list[str]:
        return [endpoint.server_id for endpoint in state.inference_endpoints]

    pre = await suite.join("p", kind=PREPROCESS)
    cold = await suite.join("cold", automatic=False)
    warm = await suite.join("warm")
    await pre.state_when(lambda s: ids(s) == ["warm"])
    cold.nack(cold.states[-1], "one model of many does not run")
    await pre.state_when(lambda s: ids(s) == ["cold", "warm"])
    # Who is away comes last, and leaves with its lease, unless there is nobody else.
    await cold.close()
    await pre.state_when(lambda s: ids(s) == ["warm", "cold"])
    await pre.state_when(lambda s: s is pre.states[-1] and ids(s) == ["warm"])
    await warm.close()
    await asyncio.sleep(1.0)
    assert ids(pre.states[-1]) != []


async def test_servers_are_listed_in_pages(suite: Any) -> None:
    for number in range(3):
        await suite.join(f"s{number}", kind=PREPROCESS)
    page = await suite.client.fleet.ListServers(fleet_pb.ListServersRequest(page_size=2))
    assert [server.name for server in page.servers] == ["servers/s0", "servers/s1"]
    rest = await suite.client.fleet.ListServers(
        fleet_pb.ListServersRequest(page_size=2, page_token=page.next_page_token)
    )
    assert [server.name for server in rest.servers] == ["servers/s2"]
    assert not rest.next_page_token


async def test_deleting_an_alias_takes_its_route_at_once_and_drains(
    loaded: Any, helpers: Any
) -> None:
    server = await loaded.join("i")
    await loaded.client.models.DeleteAlias(
        pb.DeleteAliasRequest(name="models/m/aliases/production")
    )
    await server.state_when(lambda s: not helpers.revisions_of(s))
    # States before the deletion may still have come in between.
    first = next(state for state in server.states if helpers.route_of(state) is None)
    assert helpers.revisions_of(first) == [1]


async def test_two_aliases_share_a_revision_and_it_stays_while_one_needs_it(
    loaded: Any, helpers: Any
) -> None:
    server = await loaded.join("i")
    await loaded.client.set_alias(1, alias="canary")
    await loaded.client.alias_when(lambda a: a.state == ACTIVE, alias="canary")
    await loaded.client.set_alias(2)
    await loaded.client.alias_when(lambda a: a.state == ACTIVE)
    await asyncio.sleep(0.5)  # longer than the drain time
    assert helpers.revisions_of(server.states[-1]) == [1, 2]
    assert helpers.route_of(server.states[-1], alias="canary") == 1
    await loaded.client.set_alias(2, alias="canary")
    await server.state_when(lambda s: helpers.revisions_of(s) == [2])
