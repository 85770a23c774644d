"""Whatever servers, clients and crashes do, a switch makes before it breaks."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.models import aliases
from pollard.services.models.fleet_view import FleetView, RevisionReport, ServerView
from pollard.services.models.store import Store
from pollard.services.models.switch import Switch

INFERENCE, PREPROCESS = fleet_pb.SERVER_KIND_INFERENCE, fleet_pb.SERVER_KIND_PREPROCESS
READY, FAILED = fleet_pb.REVISION_STATE_READY, fleet_pb.REVISION_STATE_FAILED
DRAIN, TIMEOUT = 10.0, 100.0
REVISIONS = st.sampled_from([1, 2, 3])
SERVERS = st.sampled_from(["i1", "i2", "p1"])


@dataclass
class Model:
    """A server: what it truly runs, and what it said on its present stream."""

    server_id: str
    kind: Any
    loaded: set[int] = field(default_factory=set)
    route: int | None = None
    applied: int = 0
    connected: bool = False
    expected: bool = False
    acked: int = 0
    nacked: int = 0
    answered_before_report: int = 0
    reported: dict[tuple[str, int], RevisionReport] = field(default_factory=dict)
    # A report that was made, and has not arrived yet.
    on_its_way: dict[tuple[str, int], RevisionReport] | None = None

    def view(self) -> ServerView:
        return ServerView(
            server_id=self.server_id,
            kind=self.kind,
            address=f"{self.server_id}:1",
            connected=self.connected,
            serving=True,
            applied_version=self.applied if self.connected else 0,
            acked=self.acked,
            nacked=self.nacked,
            answered_before_report=self.answered_before_report,
            revisions=dict(self.reported),
        )

    def forget_stream(self) -> None:
        self.connected = False
        self.acked = self.nacked = self.answered_before_report = 0
        self.reported, self.on_its_way = {}, None


class SwitchMachine(RuleBasedStateMachine):
    """Random orders, answers, losses, crashes and time, against one registry."""

    stock: Path

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a disk: every step is a transaction.
        shared = Path("/dev/shm")  # noqa: S108 - a fresh directory below it
        self.directory = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
        shutil.copytree(self.stock, self.directory / "store")
        self.store = Store(self.directory / "store")
        self.store.open()
        self.now = 0.0
        self.servers = {
            "i1": Model("i1", INFERENCE),
            "i2": Model("i2", INFERENCE),
            "p1": Model("p1", PREPROCESS),
        }
        self.version = 0
        # When each server last routed to a revision; requests can be in flight from then on.
        self.last_routed: dict[tuple[str, int], float] = {}
        self.begin_manager()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    @initialize()
    def begin(self) -> None:
        for server_id in self.servers:
            self.connect(server_id)
        for server_id in self.servers:
            self.apply(server_id, [])

    def step(self) -> None:
        view = FleetView([s.view() for s in self.servers.values() if s.expected])
        result = self.store.write_now(lambda session: self.switch.step(session, view))
        assert result.version >= self.version, "versions never go back"
        assert result.version > self.version or result.state == self.state
        self.version, self.state = result.version, result.state

    def wanted(self) -> set[int]:
        return {r.revision for model in self.state.models for r in model.revisions}

    def routed(self) -> int | None:
        for model in self.state.models:
            for route in model.routes:
                return int(route.targets[0].revision)
        return None

    @rule(return_at_once=st.sets(SERVERS), rarely=st.integers(0, 3))
    def restart(self, return_at_once: set[str], rarely: int) -> None:
        """The manager dies; only the registry is left, and who was there is waited for."""
        if rarely:
            return
        self.begin_manager()
        for server_id in sorted(return_at_once):
            self.connect(server_id)

    def begin_manager(self) -> None:
        for server in self.servers.values():
            server.forget_stream()
        self.switch = Switch(
            drain_seconds=DRAIN, load_timeout_seconds=TIMEOUT, clock=lambda: self.now
        )
        self.state = fleet_pb.DesiredState()
        before, self.version = self.version, 0
        self.step()
        assert self.version >= before

    @rule(revision=REVISIONS)
    def set_alias(self, revision: int) -> None:
        self.store.write_now(
            lambda session: aliases.set_alias(
                session,
                "m",
                "production",
                revision,
                etag="",
                allow_signature_change=False,
                actor="test",
            )
        )
        self.step()

    @rule(revision=REVISIONS, most=st.booleans())
    def switch_begins_well(self, revision: int, most: bool) -> None:
        self.set_alias(revision)
        if most:
            self.all_but_one_do_as_told()
        else:
            self.everybody_does_as_told()

    @rule(server_id=SERVERS)
    def connect(self, server_id: str) -> None:
        server = self.servers[server_id]
        if not server.expected:
            # Away for long: it begins anew, and takes requests only after its first answer.
            server.loaded, server.route = set(), None
        server.forget_stream()
        server.connected = server.expected = True
        self.step()

    @rule(server_id=SERVERS, loses_memory=st.booleans(), rarely=st.integers(0, 2))
    def disconnect(self, server_id: str, loses_memory: bool, rarely: int) -> None:
        server = self.servers[server_id]
        if rarely:
            return
        server.forget_stream()
        if loses_memory:
            server.loaded = set()
        self.step()

    @rule()
    def everybody_does_as_told(self) -> None:
        for server_id, server in self.servers.items():
            if not server.connected:
                self.connect(server_id)
            self.apply(server_id, [])

    @rule()
    def all_but_one_do_as_told(self) -> None:
        for server_id in ("i1", "p1"):
            self.apply(server_id, [])

    @rule(server_id=SERVERS, cannot=st.sampled_from([[], [], [1], [2], [3]]))
    def apply(self, server_id: str, cannot: list[int]) -> None:
        """The server takes the newest state, as far as it can, and answers."""
        server = self.servers[server_id]
        if not server.connected:
            return
        failed = {n for n in self.wanted() & set(cannot) if n not in server.loaded}
        server.loaded = self.wanted() - failed
        if not failed or self.routed() in server.loaded:
            server.route = self.routed()
        server.applied = self.version
        self.note_routes()
        server.answered_before_report = max(server.acked, server.nacked)
        server.reported, server.on_its_way = self.report_of(server, failed), None
        if failed:
            server.nacked = self.version
        else:
            server.acked = self.version
        self.step()

    def report_of(self, server: Model, failed: set[int]) -> dict[tuple[str, int], RevisionReport]:
        return {("m", n): RevisionReport(READY) for n in server.loaded} | {
            ("m", n): RevisionReport(FAILED) for n in failed
        }

    @rule(server_id=SERVERS)
    def make_report(self, server_id: str) -> None:
        server = self.servers[server_id]
        if server.connected:
            server.on_its_way = self.report_of(server, set())

    @rule(server_id=SERVERS)
    def late_report_arrives(self, server_id: str) -> None:
        """A stream keeps its order: a report made before an answer arrives before it."""
        server = self.servers[server_id]
        if server.on_its_way is None:
            return
        server.reported, server.on_its_way = server.on_its_way, None
        server.answered_before_report = max(server.acked, server.nacked)
        self.step()

    @rule(server_id=SERVERS)
    @precondition(lambda self: any(s.expected and not s.connected for s in self.servers.values()))
    def lease_runs_out(self, server_id: str) -> None:
        server = self.servers[server_id]
        if not server.connected:
            # Who is gone for good takes no more part; what it runs is nobody's concern.
            server.expected, server.loaded, server.route = False, set(), None
            self.step()

    @rule(seconds=st.sampled_from([1.0, DRAIN / 2, DRAIN, TIMEOUT]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.note_routes()
        self.step()

    def note_routes(self) -> None:
        for server in self.servers.values():
            if server.expected and server.route is not None:
                self.last_routed[server.server_id, server.route] = self.now

    @invariant()
    def a_route_leads_to_what_is_wanted(self) -> None:
        assert self.routed() in self.wanted()

    @invariant()
    def no_connected_server_lacks_what_is_routed_to_elsewhere(self) -> None:
        """While a server sends requests to a revision, every connected one that was not just
        (re)started has it loaded."""
        routes = {s.route for s in self.servers.values() if s.expected and s.route is not None}
        for server in self.servers.values():
            if server.connected and server.acked:
                missing = {route for route in routes if route not in server.loaded}
                assert not missing, (server, routes)

    @invariant()
    def nothing_is_freed_while_requests_can_be_in_flight(self) -> None:
        for (server_id, revision), when in self.last_routed.items():
            server = self.servers[server_id]
            if server.expected and self.now - when < DRAIN and server.route != revision:
                assert revision in self.wanted() or server.route is None, (server, revision)


@pytest.mark.long
def test_any_order_of_events_makes_before_it_breaks(stock: Path) -> None:
    machine = type("OnStock", (SwitchMachine,), {"stock": stock})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
