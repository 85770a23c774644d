"""`pollard top`: rates out of counters, and what it shows, also at 80 columns."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from pollard.client import Alias, Event, Model, Rollout, Unavailable
from pollard.client.cli import top, top_view
from pollard.client.cli._common import plain
from pollard.client.cli.top_rates import Histogram, Meter
from pollard.client.cli.top_view import Standing
from pollard.models.v1 import fleet_service_pb2 as pb

BEGAN = 1_790_000_000


def server(
    name: str,
    seconds: float,
    succeeded: int,
    *,
    kind: int = pb.SERVER_KIND_INFERENCE,
    run: str = "a",
    connected: bool = True,
    state: int = pb.REVISION_STATE_READY,
    failed: int = 0,
    waiting: int = 0,
    buckets: dict[int, int] | None = None,
) -> pb.Server:
    """What the manager says of a server that reported so many seconds after the beginning."""
    made = pb.Server(name=f"servers/{name}", connected=connected)
    made.hello.server_id, made.hello.kind, made.hello.address = name, kind, "10.0.0.7:8001"
    made.report.time.FromNanoseconds(int((BEGAN + seconds) * 1e9))
    made.last_seen_time.GetCurrentTime()
    status = made.report.revisions.add(model="flowers", revision=3, state=state, waiting=waiting)
    status.counters.run_id = run
    status.counters.succeeded, status.counters.failed = succeeded, failed
    counts = buckets or {}
    first = min(counts, default=0)
    status.counters.latency.scale, status.counters.latency.offset = 4, first
    status.counters.latency.counts.extend(
        counts.get(index, 0) for index in range(first, max(counts, default=-1) + 1)
    )
    return made


KEY = ("INFERENCE", ("flowers", 3))


def test_rates_are_of_the_window_and_of_all_servers() -> None:
    meter = Meter(10)
    meter.note([server("a", 0, 1000, buckets={40: 1000}), server("b", 2, 0)])
    assert meter.rates()[KEY].per_second == 0
    assert not meter.knows_all
    meter.note([server("a", 5, 1100, buckets={40: 1090, 44: 10}), server("b", 7, 50, waiting=4)])
    assert meter.knows_all
    rates = meter.rates()[KEY]
    assert rates.per_second == pytest.approx(100 / 5 + 50 / 5)
    assert rates.waiting == 4
    # Only what came since the first report: 90 in bucket 40 (1024 µs) and 10 in bucket 44.
    assert rates.latency.milliseconds(0.5) == pytest.approx(1.024 * 2**0.125)
    assert rates.latency.milliseconds(0.99) == pytest.approx(2.048 * 2**0.125)
    for moment in (10, 15, 20):
        meter.note([server("a", moment, 1100), server("b", moment + 2, 50)])
    assert meter.rates()[KEY].per_second == 0
    assert meter.covered == pytest.approx(10)


def test_a_server_that_began_anew_or_has_gone_leaves_nothing_odd() -> None:
    meter = Meter(60)
    meter.note([server("a", 0, 1000), server("b", 0, 0)])
    meter.note([server("a", 5, 20, run="b"), server("b", 5, 10)])
    assert meter.rates()[KEY].per_second == pytest.approx(20 / 5 + 10 / 5)
    meter.note([server("a", 5, 20, run="b", connected=False), server("b", 10, 20)])
    assert meter.rates()[KEY].per_second == pytest.approx(2)
    assert meter.knows_all
    meter.note([server("b", 1, 30)])  # its clock was put back
    assert meter.rates()[KEY].per_second == 0


def test_histograms_of_different_scales_are_added() -> None:
    fine, coarse = pb.Histogram(scale=16, offset=160), pb.Histogram(scale=4, offset=40)
    fine.counts.extend([3, 0, 1])
    coarse.counts.extend([2])
    found = Histogram()
    found.add(fine, None)
    found.add(coarse, None)
    assert (found.scale, found.counts) == (4, {40: 6})
    found.add(pb.Histogram(scale=3, counts=[1]), None)
    assert found.counts == {40: 6}


def standing(servers: list[pb.Server], **more: Any) -> Standing:
    meter = Meter(10)
    meter.note(servers)
    then = datetime.now(UTC) - timedelta(seconds=30)
    alias = {
        "model": "flowers",
        "previous_revision": 0,
        "error": "",
        "failures": (),
        "update_time": None,
        "etag": "",
    }
    model = Model(
        name="flowers",
        description="",
        labels={},
        latest_revision=3,
        aliases=(
            Alias(name="production", revision=3, pending_revision=4, state="LOADING", **alias),
            Alias(name="canary", revision=3, pending_revision=0, state="ACTIVE", **alias),
        ),
        create_time=None,
        update_time=None,
        etag="",
    )
    event = Event(
        sequence=7,
        time=then,
        actor="manager",
        action="ALIAS_SET",
        resource="models/flowers/aliases/production",
        detail="to revision 4 from 3, " + "because it is better " * 5,
    )
    given: dict[str, Any] = {"models": [model], "rollouts": [], "events": [event]} | more
    return Standing("127.0.0.1:8021", servers, meter.rates(), meter.covered, **given)


def at_80_columns(shown: Standing) -> list[str]:
    console = Console(file=io.StringIO(), width=80, height=24, highlight=False)
    console.print(top_view.picture(shown))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # of a StringIO
    assert all(len(line) <= 80 for line in lines)
    return [line.rstrip() for line in lines]


def test_it_fits_80_columns_and_tells_what_is_away() -> None:
    lines = at_80_columns(
        standing(
            [
                server("inference-1", 0, 5, waiting=12345),
                server("inference-2", 0, 5, state=pb.REVISION_STATE_LOADING),
                server("inference-3", 0, 5, connected=False),
                server("preprocess-1", 0, 5, kind=pb.SERVER_KIND_PREPROCESS),
            ]
        ).without_manager("connection refused")
    )
    text = "\n".join(lines)
    assert "3 of 4 servers connected  no rates yet" in lines[0]
    assert "THE MANAGER IS AWAY" in text
    assert "connection refused" in text
    assert "AWAY: inference-3 (inference, 10.0.0.7:8001), last heard 0 s ago" in text
    (row,) = [line for line in lines if line.startswith("flowers/3")]
    assert row.split()[1:] == ["canary,", "produ…", "0", "–", "–", "12345", "0", "0", "1/2"]
    assert "flowers production: 3 → 4, servers load it" in text
    (change,) = [line for line in lines if "30 s ago" in line]
    assert change.startswith("  30 s ago  flowers production: to revision 4")
    assert change.endswith("…")


def test_nothing_at_all_says_what_to_do() -> None:
    text = "\n".join(at_80_columns(standing([], models=[], events=[])))
    assert "`pollard up` starts some" in text
    assert "Nothing is served." in text


def test_programs_get_numbers() -> None:
    shown = json.loads(json.dumps(plain(top_view.plain(standing([server("a", 0, 5)])))))
    assert shown["manager"] == {"address": "127.0.0.1:8021", "answers": True, "error": ""}
    (revision,) = shown["revisions"]
    assert revision["states"] == {"a": "READY"}
    assert revision["p99_ms"] is None
    assert shown["switches"][0]["alias"] == "models/flowers/aliases/production"


def test_it_looks_on_while_the_manager_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "_LOOK_SECONDS", 0.0)

    class Client:
        address = "127.0.0.1:8021"
        asked = 0

        def _servers(self) -> list[pb.Server]:
            self.asked += 1
            if self.asked == 2:
                raise Unavailable("gone", address=self.address, method="", details=None)
            return [server("a", self.asked, 10 * self.asked)]

        def models(self) -> list[Model]:
            return []

        def rollouts(self, *, running_only: bool) -> list[Rollout]:
            return []

        def events(self, limit: int) -> list[Event]:
            return []

    looks = top._Eyes(Client(), Meter(10)).looks()  # type: ignore[arg-type]  # what it asks of it
    assert next(looks).trouble == ""
    away = next(looks)
    assert away.trouble == "gone"
    assert len(away.servers) == 1
    back = next(looks)
    assert back.trouble == ""
    assert back.rates[KEY].per_second == pytest.approx(10)
