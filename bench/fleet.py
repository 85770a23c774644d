"""A fleet on hosts made here, behind Envoy: `python -m bench.fleet`, as root.

Scaling: each of three inference servers alone, then all of them through Envoy, in turns; each host
has so small a share of a core that all of them, Envoy and the callers fit the machine. Failover:
requests come at a steady rate while one host loses its power, or the processes on it are killed,
and comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bench.environment import environment, heading
from bench.installation import Installation
from bench.peers.fetch import ROOT
from bench.statistics import interval
from pollard.client import ModelsClient, RetryPolicy
from pollard.client.load import IMAGE, KINDS, TENSOR, Answers, Load
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference
from pollard.services.drill.bundles import drill_bundle, drill_samples

_MODEL = "fleet"
_MEGABYTES = 16.0
_BACK_SECONDS = 5.0
"""From so long after the loss on, latencies should be what they were."""
_FLAGS = ("--workers", "1", "--intra-op-threads", "1", "--joined-batch", "1")


@contextlib.contextmanager
def _running(cores: float) -> Iterator[tuple[Installation, Bundle]]:
    with tempfile.TemporaryDirectory(prefix="pollard-fleet-") as name:
        folder = Path(name)
        bundle = drill_bundle(folder / "bundle", 1, _MEGABYTES)
        with Installation(folder, cores=cores, flags=_FLAGS) as installation:
            with ModelsClient(",".join(installation.managers)) as models:
                models.push(bundle.path, _MODEL, alias="production")
                models.wait_alias(_MODEL, "production", 1)
            yield installation, bundle


def _load(inference: str, vision: str, bundle: Bundle, clients: int, kinds: Sequence[str]) -> Load:
    samples = drill_samples()
    return Load(
        model=_MODEL,
        vision=vision,
        inference=inference,
        samples=samples,
        references={1: Reference(bundle, samples)},
        clients=clients,
        kinds=kinds,
        timeout=30,
        retry=RetryPolicy(),
    )


async def _rate(address: str, bundle: Bundle, callers: int, seconds: float) -> float:
    """Return requests answered in a second, by so many callers, each one after the other."""
    load = _load(address, address, bundle, callers, (TENSOR,))
    running = asyncio.create_task(load.run())
    await asyncio.sleep(1.0)
    began, before = time.perf_counter(), load.traffic.total
    await asyncio.sleep(seconds)
    rate = (load.traffic.total - before) / (time.perf_counter() - began)
    load.finish()
    await running
    if load.traffic.bad:
        raise RuntimeError(f"requests failed: {load.traffic.problems}")
    return rate


def _scaling(cores: float, rounds: int, seconds: float, callers: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    with _running(cores) as (installation, bundle):
        addresses = [f"{host.address}:8001" for host in installation.serving]

        def alone() -> list[float]:
            return [asyncio.run(_rate(each, bundle, callers, seconds)) for each in addresses]

        def together() -> float:
            return asyncio.run(_rate(installation.address, bundle, 3 * callers, seconds))

        for number in range(rounds):
            # Alone first, then last: what drifts cancels out over two rounds.
            if number % 2:
                fleet = together()
                each = alone()
            else:
                each = alone()
                fleet = together()
            found.append({"alone": each, "fleet": fleet, "ratio": fleet / sum(each)})
            print(f"alone {each}, fleet {fleet:.1f}: {found[-1]['ratio']:.3f}", flush=True)
    return {"cores": cores, "callers": callers, "seconds": seconds, "rounds": found}


class _Rotation(threading.Thread):
    """Notes when Envoy leaves a host out and takes it in again."""

    def __init__(self, installation: Installation, address: str) -> None:
        super().__init__(daemon=True)
        self.changes: list[tuple[float, bool]] = []
        self._installation, self._address = installation, address
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            known = self._installation.in_rotation("inference")
            well = known.get(self._address)
            if well is not None and (not self.changes or self.changes[-1][1] != well):
                self.changes.append((time.monotonic(), well))

    def finish(self) -> None:
        self._done.set()
        self.join()


def _p99(answers: Answers, kind: str, since: float, until: float) -> tuple[float, int]:
    """Return the 99th percentile in ms of the requests due in a time, and their number."""
    chosen = answers.are(kind) & (answers.started >= since) & (answers.started < until)
    if not chosen.any():
        return float("nan"), 0
    latency = (answers.ended - answers.started)[chosen]
    return float(np.percentile(latency, 99) * 1e3), int(chosen.sum())


async def _lose(
    installation: Installation, bundle: Bundle, how: str, rate: float, seconds: float
) -> dict[str, Any]:
    """Lose a host under load, and have it back."""
    host = installation.serving[2]
    load = _load(installation.address, installation.address, bundle, 8, KINDS)
    running = asyncio.create_task(load.run_at(rate))
    rotation = _Rotation(installation, host.address)
    rotation.start()
    await asyncio.sleep(2.0)
    began = time.monotonic()
    await asyncio.sleep(seconds)
    lost = time.monotonic()
    if how == "power":
        await asyncio.to_thread(installation.power_off, host)
    else:
        await asyncio.to_thread(host.kill)
    await asyncio.sleep(_BACK_SECONDS + seconds)
    again = time.monotonic()
    await asyncio.to_thread(installation.power_on, host)
    await asyncio.to_thread(
        installation.until, lambda: installation.well("inference") == 3, "the host is back"
    )
    back = time.monotonic()
    await asyncio.sleep(2.0)
    load.finish()
    await running
    rotation.finish()
    answers = load.traffic.answered
    out = next((at - lost for at, well in rotation.changes if at > lost and not well), None)
    result: dict[str, Any] = {
        "how": how,
        "requests": load.traffic.total,
        "failed": load.traffic.bad,
        "problems": load.traffic.problems,
        "out_of_rotation_seconds": out,
        "back_in_rotation_seconds": back - again,
    }
    for kind in KINDS:
        steady, count = _p99(answers, kind, began, lost)
        during, _ = _p99(answers, kind, lost, lost + _BACK_SECONDS)
        after, more = _p99(answers, kind, lost + _BACK_SECONDS, again)
        late = answers.are(kind) & (answers.started >= lost) & (answers.started < again)
        slow = (answers.ended - answers.started) * 1e3 > 3 * steady
        last = answers.ended[late & slow]
        result[kind] = {
            "steady_p99_ms": steady,
            "steady_requests": count,
            "first_5_s_p99_ms": during,
            "after_5_s_p99_ms": after,
            "after_5_s_requests": more,
            "ratio": after / steady,
            # Of the requests that took more than three times the steady p99, when the last ended.
            "last_slow_seconds": float(last.max() - lost) if len(last) else 0.0,
        }
    print(json.dumps(result), flush=True)
    return result


def _failover(hows: Sequence[str], rate: float, seconds: float) -> list[dict[str, Any]]:
    with _running(0.0) as (installation, bundle):
        return [asyncio.run(_lose(installation, bundle, how, rate, seconds)) for how in hows]


def _text(found: dict[str, Any]) -> str:
    lines = ["# A fleet on hosts of one machine", "", heading(found["environment"])]
    if found["note"]:
        lines.append(found["note"])
    lines += [
        "",
        "Four hosts are network namespaces on a bridge; PostgreSQL, an S3 (moto), two managers, "
        "three inference and two preprocess servers, Envoy with `deploy/envoy/envoy.yaml`. All of "
        "it and the callers run on this one machine; the model is dense layers of "
        f"{_MEGABYTES:g} MB.",
    ]
    if scaling := found.get("scaling"):
        ratio = interval([each["ratio"] for each in scaling["rounds"]])
        lines += [
            "",
            "## Three servers behind Envoy against the three alone",
            "",
            f"{scaling['cores']:g} of a core a host, {scaling['callers']} callers a server, "
            f"tensors, {scaling['seconds']:g} s each. Fleet over sum: **{ratio}** (goal 0.9).",
            "",
            "| round | alone, requests/s | sum | fleet | ratio |",
            "|---|---|---|---|---|",
        ]
        for number, each in enumerate(scaling["rounds"], 1):
            alone = ", ".join(f"{rate:.1f}" for rate in each["alone"])
            lines.append(
                f"| {number} | {alone} | {sum(each['alone']):.1f} | {each['fleet']:.1f} "
                f"| {each['ratio']:.3f} |"
            )
    if failover := found.get("failover"):
        lines += [
            "",
            "## A host is lost",
            "",
            f"Images and tensors in turn, {found['rate']:g} requests a second in all; *power* cuts "
            "the host off without a word, *kill* kills its processes. Goals: out of rotation "
            "within 2 s; from 5 s after the loss on a p99 of at most 1.2 times the steady one; "
            "none failed.",
            "",
            "| | requests | failed | out after | back after | kind | p99 steady | first 5 s "
            "| after 5 s | ratio | last slow one ended |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for each in failover:
            for kind in KINDS:
                seen = each[kind]
                lines.append(
                    f"| {each['how']} | {each['requests']:,} | {each['failed']} "
                    f"| {_seconds(each['out_of_rotation_seconds'])} "
                    f"| {_seconds(each['back_in_rotation_seconds'])} "
                    f"| {'image' if kind == IMAGE else 'tensor'} | {seen['steady_p99_ms']:.1f} ms "
                    f"| {seen['first_5_s_p99_ms']:.0f} ms | {seen['after_5_s_p99_ms']:.1f} ms "
                    f"| {seen['ratio']:.2f} | {seen['last_slow_seconds']:.1f} s |"
                )
        lines += ["", "A slow one took more than three times the steady p99."]
    return "\n".join([*lines, ""])


def _seconds(value: float | None) -> str:
    return "not" if value is None else f"{value:.2f} s"


def main(
    only: Annotated[str, typer.Option(help="scaling or failover; both if empty.")] = "",
    cores: Annotated[float, typer.Option(help="Share of a core of each host, scaling.")] = 0.2,
    rounds: Annotated[int, typer.Option(help="Rounds of scaling.")] = 4,
    seconds: Annotated[float, typer.Option(help="How long each rate is measured.")] = 4.0,
    callers: Annotated[int, typer.Option(help="Callers a server, scaling.")] = 4,
    losses: Annotated[str, typer.Option(help="How hosts are lost.")] = "power,kill,power",
    rate: Annotated[float, typer.Option(help="Requests a second, failover.")] = 60.0,
    steady: Annotated[float, typer.Option(help="Seconds before and after, failover.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
    note: Annotated[str, typer.Option(help="What else the machine did meanwhile.")] = "",
) -> None:
    """Measure; a part that is measured anew takes the place of that part in today's result."""
    file = out / f"fleet-{time.strftime('%Y-%m-%d')}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found |= {"environment": environment(), "note": note or found.get("note", "")}
    if only in ("", "scaling"):
        found["scaling"] = _scaling(cores, rounds, seconds, callers)
        found["scaling"]["load_average_after"] = os.getloadavg()
    if only in ("", "failover"):
        found["rate"] = rate
        found["failover"] = _failover(losses.split(","), rate, steady)
        found["failover_load_average_after"] = os.getloadavg()
    file.write_text(json.dumps(found, indent=1) + "\n")
    file.with_suffix(".md").write_text(_text(found))
    print(_text(found))


if __name__ == "__main__":
    typer.run(main)
