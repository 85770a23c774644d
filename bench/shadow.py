"""What shadows cost the requests beside them: `python -m bench.shadow`.

Requests come at random moments (Poisson) at half of what the server can do; shadows are switched
off, on, on and off in every round, so that what drifts over the round cancels out.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import typer

from bench.environment import environment, heading
from bench.lone_server import Desired, Fleet, ServedBundle, start_fleet_server
from bench.models import MODELS, BuiltModel
from bench.peers.fetch import ROOT
from bench.pollard_server import make_bundle
from bench.statistics import Interval, interval
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

_ALLOWED_P50 = 1.05
"""p50 with shadows over that without."""

_CHANNELS = 4


class _Load:
    """Requests at random moments."""

    def __init__(self, stubs: list[Any], model: BuiltModel) -> None:
        self._stubs = stubs
        self._request = pb.ModelInferRequest(model_name=model.name)
        shape = (1, *model.input_shape)
        self._request.inputs.add(name=model.input, datatype="FP32", shape=shape)
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        self._request.raw_input_contents.append(values.tobytes())
        self._chance = np.random.default_rng(1)
        self.failed = 0

    async def one(self, number: int = 0) -> float:
        started = time.perf_counter()
        try:
            await self._stubs[number % len(self._stubs)].ModelInfer(self._request, timeout=10)
        except grpc.RpcError:
            self.failed += 1
        return time.perf_counter() - started

    async def alone(self, count: int = 200) -> float:
        """Return the median time of requests that come one after the other."""
        return float(np.median([await self.one() for _ in range(count)]))

    async def capacity(self, seconds: float) -> float:
        """Return how many requests a second are answered when always some wait."""
        until, done = time.perf_counter() + seconds, 0

        async def caller(number: int) -> None:
            nonlocal done
            while time.perf_counter() < until:
                await self.one(number)
                done += 1

        await asyncio.gather(*(caller(number) for number in range(8)))
        return done / seconds

    async def at_rate(self, rate: float, seconds: float) -> np.ndarray:
        """Send requests at random moments; return how long each took."""
        tasks = []
        started = now = time.perf_counter()
        while now - started < seconds:
            now += float(self._chance.exponential(1 / rate))
            await asyncio.sleep(max(0.0, now - time.perf_counter()))
            tasks.append(asyncio.create_task(self.one(len(tasks))))
        return np.array(await asyncio.gather(*tasks))


async def _measure(
    model: BuiltModel, share: float, load: float, rounds: int, seconds: float, folder: Path
) -> dict[str, Any]:
    base = ServedBundle(1, make_bundle(model))
    async with start_fleet_server(folder / "cache", [base.bundle]) as (server, fleet):
        # The same bundle twice: what is measured is the cost, not the difference.
        other = ServedBundle(2, base.bundle)

        async def switch(on: bool) -> None:
            served = replace(base, shadow=(other, share if on else 0.0))
            await fleet.apply(Desired({model.name: served}))

        await switch(False)
        channels = [
            # Channels to one address would otherwise share a connection.
            grpc.aio.insecure_channel(server.address, options=[("grpc.channel_id", number)])
            for number in range(_CHANNELS)
        ]
        stubs = [pb_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
        requests = _Load(stubs, model)
        await requests.alone()
        service = await requests.alone()
        rate = load * await requests.capacity(4)
        rows = await _rounds(requests, switch, rate, rounds, seconds)
        shadows = await _counted(fleet)
        for channel in channels:
            await channel.close()
    return {
        "service_ms": service * 1e3,
        "rate": rate,
        "rounds": rows,
        "failed": requests.failed,
        "shadows": shadows,
    }


async def _rounds(
    requests: _Load, switch: Any, rate: float, rounds: int, seconds: float
) -> list[dict[str, float]]:
    rows = []
    for _ in range(rounds):
        took: dict[str, list[np.ndarray]] = {"off": [], "on": []}
        for kind in ("off", "on", "on", "off"):
            await switch(kind == "on")
            took[kind].append(await requests.at_rate(rate, seconds))
        row = {}
        for kind, parts in took.items():
            both = np.concatenate(parts)
            row[f"{kind}_p50_ms"] = float(np.median(both)) * 1e3
            row[f"{kind}_p99_ms"] = float(np.percentile(both, 99)) * 1e3
        rows.append(row)
        print(
            f"p50 {row['off_p50_ms']:.3f} ms without, {row['on_p50_ms']:.3f} ms with shadows; p99 "
            f"{row['off_p99_ms']:.2f} and {row['on_p99_ms']:.2f} ms",
            flush=True,
        )
    return rows


async def _counted(fleet: Fleet) -> dict[str, int]:
    found = await fleet.shadows()
    return {name: getattr(found, name) for name in ("compared", "agreed", "dropped", "failed")}


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "resnet56",
    share: Annotated[float, typer.Option(help="Share of the requests that are copied.")] = 0.1,
    load: Annotated[float, typer.Option(help="Load as a part of the capacity.")] = 0.5,
    rounds: Annotated[int, typer.Option(help="Rounds of off, on, on, off.")] = 7,
    seconds: Annotated[float, typer.Option(help="Of each part of a round.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Compare latencies with and without shadows; exit with 1 if they cost more than allowed."""
    before = environment()
    with tempfile.TemporaryDirectory(prefix="pollard-shadow-") as folder:
        built = MODELS[model]()
        found = asyncio.run(_measure(built, share, load, rounds, seconds, Path(folder)))
    rows = found["rounds"]
    p50: Interval = interval([row["on_p50_ms"] / row["off_p50_ms"] for row in rows])
    longer: Interval = interval([row["on_p99_ms"] - row["off_p99_ms"] for row in rows])
    counted = found["shadows"]
    text = "\n".join(
        [
            "# What shadows cost the requests beside them",
            "",
            heading(before),
            "",
            f"{built.title}, {found['rate']:.0f} requests a second at random moments ({load:.0%} "
            f"of the capacity), {share:.0%} of them copied, {rounds} rounds of four times "
            f"{seconds:g} s: p50 with shadows {p50} × that without (allowed {_ALLOWED_P50}); p99 "
            f"longer by {longer} ms (allowed: one service time, {found['service_ms']:.2f} ms for "
            f"a request alone). Copies: {counted['compared']} compared, {counted['dropped']} "
            f"dropped, {counted['failed']} failed. {found['failed']} requests failed.",
            "",
        ]
    )
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"shadow-{model}-{time.strftime('%Y-%m-%d')}"
    file.with_suffix(".md").write_text(text)
    content = {"environment": before, **found}
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    too_slow = p50.median > _ALLOWED_P50 or longer.median > found["service_ms"]
    if too_slow or found["failed"] or not counted["compared"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
