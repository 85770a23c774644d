"""What operating costs: `python -m bench.operations PART…`, and `report` at the end.

Each part takes two minutes at most and adds to the day's results; the same part again adds rounds.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.environment import environment, heading
from bench.operations.fair import fair
from bench.operations.paint import paint
from bench.operations.pairs import judged, now, telemetry, tls
from bench.operations.small import small
from bench.operations.starting import starting
from bench.peers.fetch import ROOT
from bench.statistics import ratios

PARTS = ("small", "telemetry", "tls", "fair", "fair-limited", "starting", "page")

_LIMITED = ("--max-concurrent-requests", "1")


def _measure(part: str, model: str, rounds: int, seconds: float) -> dict[str, Any]:
    if part == "small":
        return small()
    if part == "telemetry":
        return telemetry(model, rounds, seconds)
    if part == "tls":
        return tls(model, rounds, seconds)
    if part == "fair":
        return fair(max(1, rounds // 2), seconds, ())
    if part == "fair-limited":
        return fair(max(1, rounds // 2), seconds, _LIMITED)
    if part == "starting":
        return starting(rounds)
    return paint()


def _joined(before: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """Add the rounds of an earlier run of the same part."""
    if before is None or "runs" not in more:
        return more
    for name, pairs in more["runs"].items():
        pairs[:0] = before["runs"][name]
    for key in ("spans", "access_lines"):
        if key in more:
            more[key] += before[key]
    if "greedy" in more:
        more["greedy"][:0] = before["greedy"]
    return more


def _report(content: dict[str, Any]) -> list[str]:
    parts = content["parts"]
    lines = []
    if found := parts.get("small"):
        lines += [
            f"- Token check, {found['tokens']:,} tokens known: {found['token_check_us']:.1f} µs "
            "(goal 20).",
            f"- Counting a call: {found['count_us']:.1f} µs; with its id and access log "
            f"{found['record_us']:.1f} µs; with traces on, not kept, "
            f"{found['record_with_traces_us']:.1f} µs.",
        ]
    for part, base, other, words, goal in (
        ("telemetry", "quiet", "telling", "Metrics, traces of 1 % and logs", "0.97"),
        ("tls", "plain", "tls", "TLS", "0.90"),
    ):
        if found := parts.get(part):
            seen = judged(found, base, other)
            lines.append(
                f"- {words}, {found['model']} at concurrency 16, {len(found['runs'][base])} "
                f"rounds: throughput × {seen['throughput']} (goal {goal}); processor time of the "
                f"server for a request × {seen['cpu']}; p99 × {seen['p99']}. The same server "
                f"twice: {seen['control']}, {seen['control_cpu']}."
            )
    for part in ("fair", "fair-limited"):
        if found := parts.get(part):
            runs = found["runs"]

            def of(name: str, what: str, runs: dict[str, Any] = runs) -> list[list[float]]:
                return [[one[what] for one in pair] for pair in runs[name]]

            offered = [one["offered_per_second"] / found["capacity"] for one in found["greedy"]]
            lines.append(
                f"- Modest client ({found['limits'] or 'no limits'}), beside one that offers "
                f"{min(offered):.1f} × the capacity, over alone, {len(runs['alone'])} rounds: p99 "
                f"× {ratios(of('beside', 'p99_ms'), of('alone', 'p99_ms'))} (goal 1.5), p50 × "
                f"{ratios(of('beside', 'p50_ms'), of('alone', 'p50_ms'))}; "
                f"{sum(one['failed'] for pair in runs['beside'] for one in pair)} of its requests "
                "failed."
            )
    if found := parts.get("starting"):
        goals = {"models": 1.5, "inference": 2.0, "preprocess": 1.0}
        lines += [
            f"- Start to ready, {service}: {seen['median']:.2f} s "
            f"({min(seen['seconds']):.2f}–{max(seen['seconds']):.2f}; goal {goals[service]})."
            for service, seen in found.items()
            if service in goals
        ]
    if found := parts.get("page"):
        lines.append(
            f"- Page: first paint {found['median_ms']:.0f} ms (goal 300), "
            f"{found['bytes'] / 1000:.0f} KB in {found['requests']} requests (goal 200)."
        )
    return lines


def main(
    part: Annotated[list[str], typer.Argument(help=f"{', '.join(PARTS)}; report only writes.")],
    model: Annotated[str, typer.Option(help="For telemetry and tls.")] = "resnet56",
    rounds: Annotated[int, typer.Option(help="Each A B B A.")] = 4,
    seconds: Annotated[float, typer.Option(help="Of each run.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
    note: Annotated[str, typer.Option(help="What else the machine did meanwhile.")] = "",
) -> None:
    """Measure parts, and write what is known."""
    file = out / f"operations-{time.strftime('%Y-%m-%d')}"
    kept = file.with_suffix(".json")
    content: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"parts": {}}
    content.setdefault("environment", environment())
    if note:
        content["note"] = note
    for name in part:
        if name == "report":
            continue
        if name not in PARTS:
            raise typer.BadParameter(f"{name} is none of {', '.join(PARTS)}")
        load = os.getloadavg()[0]
        measured = _measure(name, model, rounds, seconds)
        content["parts"][name] = _joined(content["parts"].get(name), measured)
        content.setdefault("taken", {}).setdefault(name, []).append([now(), round(load, 2)])
        kept.write_text(json.dumps(content, indent=1) + "\n")
    text = [
        "# Operating",
        "",
        heading(content["environment"]),
        *([content["note"]] if content.get("note") else []),
        "",
        "Rounds are A B B A, so that what drifts cancels out; intervals are of 95 %, by resampling "
        "the rounds. Load average before each part: "
        + "; ".join(
            f"{name} {', '.join(str(load) for _, load in taken)}"
            for name, taken in content.get("taken", {}).items()
        )
        + ".",
        "",
        *_report(content),
        "",
    ]
    file.with_suffix(".md").write_text("\n".join(text))
    print("\n".join(_report(content)))


if __name__ == "__main__":
    typer.run(main)
