"""Simulated servers of a fleet, many in one process: `bench.scale` starts a few of these.

Each has a connection of its own and speaks Sync as a server does: Hello, reports, and an answer to
each state. It loads nothing: what it is told to run it says to have. A line on standard input asks
for figures; they come as a line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc

_OPTIONS = [
    # As real servers have it, each has a connection of its own.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC waits a minute for the answer to a ping unless it is told this, too.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
]
_HISTOGRAM = fleet_pb.Histogram(offset=20, counts=[3] * 48, sum_us=1e6)


class Figures:
    """What the servers of this process have seen."""

    def __init__(self) -> None:
        self.connected = 0
        self.states = 0
        self.broken = 0
        self.reasons: dict[str, int] = {}
        """Why, by code and what was said."""
        self.switches: dict[int, tuple[int, float, float]] = {}
        """For the n-th change of the routes: servers that have acknowledged it, and when the first
        and the last did, by the clock that all processes of a machine share."""

    def acknowledged(self, switch: int) -> None:
        now = time.monotonic()
        count, first, _ = self.switches.get(switch, (0, now, now))
        self.switches[switch] = (count + 1, first, now)


class Simulated:
    """One server."""

    def __init__(self, index: int, preprocess: bool, address: str, figures: Figures) -> None:
        self._name = f"server-{index:05}"
        self._preprocess = preprocess
        self._manager = address
        self._figures = figures
        self._state = fleet_pb.DesiredState()
        self._routes: dict[tuple[str, str], int] = {}
        self._switches = 0
        self._outbox: asyncio.Queue[fleet_pb.SyncRequest] = asyncio.Queue()
        self._seconds = 5.0
        self._counted = 0

    async def run(self) -> None:
        """Keep a stream open."""
        while True:
            async with grpc.aio.insecure_channel(self._manager, options=_OPTIONS) as channel:
                try:
                    await self._stream(channel)
                except grpc.aio.AioRpcError as error:
                    self._figures.broken += 1
                    why = f"{error.code().name}: {(error.details() or '')[:80]}"
                    self._figures.reasons[why] = self._figures.reasons.get(why, 0) + 1
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        self._outbox = asyncio.Queue()
        number = int(self._name[-5:])
        kind = fleet_pb.SERVER_KIND_PREPROCESS if self._preprocess else None
        hello = fleet_pb.Hello(
            server_id=self._name,
            kind=kind or fleet_pb.SERVER_KIND_INFERENCE,
            address=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:8001",
            applied_version=self._state.version,
            software_version="0.1.0",
            wants_access=True,
        )
        self._outbox.put_nowait(fleet_pb.SyncRequest(hello=hello))
        call: Any = fleet_grpc.FleetServiceStub(channel).Sync(self._messages())
        first = True
        reporting = asyncio.create_task(self._report_regularly())
        try:
            async for response in call:
                if first:
                    self._figures.connected += 1
                    first = False
                if response.HasField("desired_state"):
                    self._apply(response.desired_state)
        finally:
            reporting.cancel()
            self._figures.connected -= not first

    async def _messages(self) -> AsyncIterator[fleet_pb.SyncRequest]:
        while True:
            yield await self._outbox.get()

    async def _report_regularly(self) -> None:
        await asyncio.sleep(random.uniform(0, self._seconds))
        while True:
            self._report()
            await asyncio.sleep(self._seconds)

    def _report(self) -> None:
        self._counted += 500
        report = fleet_pb.Report()
        for model in self._state.models:
            for revision in model.revisions:
                status = report.revisions.add(
                    model=model.model,
                    revision=revision.revision,
                    state=fleet_pb.REVISION_STATE_READY,
                )
                status.counters.succeeded = self._counted
                status.counters.run_id = self._name
                if not self._preprocess:
                    status.variant = "cpu-fp32"
                    status.counters.latency.CopyFrom(_HISTOGRAM)
        self._outbox.put_nowait(fleet_pb.SyncRequest(report=report))

    def _apply(self, state: fleet_pb.DesiredState) -> None:
        self._figures.states += 1
        self._state = state
        self._seconds = state.report_interval.ToTimedelta().total_seconds() or self._seconds
        self._report()
        ack = fleet_pb.Ack(version=state.version, nonce=state.nonce)
        self._outbox.put_nowait(fleet_pb.SyncRequest(ack=ack))
        routes = {
            (model.model, route.alias): route.targets[0].revision
            for model in state.models
            for route in model.routes
        }
        if routes != self._routes:
            self._routes = routes
            self._switches += 1
            self._figures.acknowledged(self._switches)


async def main(address: str, first: int, count: int, preprocess: int) -> None:
    """Run `count` servers, of which `preprocess` prepare images, until standard input ends."""
    figures = Figures()
    tasks = []
    for place in range(count):
        server = Simulated(first + place, place < preprocess, address, figures)
        tasks.append(asyncio.create_task(server.run()))
        await asyncio.sleep(0.002)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while await reader.readline():
        print(json.dumps(vars(figures)), flush=True)
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
