"""Swaps and kills under load, by `pollard drill swap`: `python -m bench.swap_drill`.

Long drills are made of shorter ones, each with services of its own, and kept in a file: one that
was broken off goes on where it ended. A drill whose own process stood still meanwhile – stopped by
a signal, or with its machine – says nothing about the services, so it is thrown away, counted, and
made again.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.environment import environment, heading
from bench.peers.fetch import ROOT

_ALLOWED_RATIO = 1.2
"""p99 within 250 ms of a swap over the p99 out of swaps."""

_BEAT_SECONDS = 0.2
_STOOD_STILL_SECONDS = 3.0


def _allowed_ms(megabytes: float) -> float:
    """From `SetAlias` to every server answering by the new revision: 1 s for 10 MB, 3 s for 100."""
    return 1000.0 if megabytes <= 10 else 3000.0


class _Heart:
    """Notices when this process, and with it the drill that it started, did not run."""

    def __init__(self) -> None:
        self.longest = 0.0
        """Longest time between two beats, seconds."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(_BEAT_SECONDS):
            now = time.monotonic()
            self.longest = max(self.longest, now - last)
            last = now


def _drill(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pollard-bench-") as folder, _Heart() as heart:
        figures = Path(folder) / "figures.json"
        load = os.getloadavg()[0]
        code = subprocess.run(
            [
                *(sys.executable, "-m", "pollard.client.cli", "drill", "swap"),
                *arguments,
                *("--json", str(figures)),
            ],
            check=False,
        ).returncode
        return {
            "arguments": arguments,
            "code": code,
            "load_average": [load, os.getloadavg()[0]],
            "stood_still": heart.longest > _STOOD_STILL_SECONDS,
            "figures": json.loads(figures.read_text()) if figures.exists() else None,
        }


def _plan(swaps: int, kills: int, each: int, kills_each: int, seed: int) -> Iterable[list[str]]:
    """Yield what each drill is told of swaps, kills and seed."""
    runs = 0
    while swaps > 0 or kills > 0:
        now, now_kills = min(each, swaps), min(kills_each, kills)
        words = ["--swaps", str(max(1, now)), "--seed", str(seed + runs)]
        if now_kills and not now:
            words += ["--kill", "random", "--kills", str(now_kills)]
            kills -= now_kills
        yield words
        swaps -= now
        runs += 1


def _text(runs: list[dict[str, Any]], thrown: int, megabytes: float, load: str, head: str) -> str:
    figures = [run["figures"] for run in runs]
    swapping = [found for found in figures if not found["kills"]]

    def total(name: str) -> int:
        return sum(found[name] for found in figures)

    def spread(found: Iterable[float], form: str = ".0f", unit: str = " ms") -> str:
        values = list(found)
        middle, most = statistics.median(values), max(values)
        if len(values) == 1:
            return f"{middle:{form}}{unit}"
        return f"{middle:{form}}{unit} in the median drill, {most:{form}}{unit} in the worst"

    def of(name: str, key: str) -> list[float]:
        return [found[name][key] for found in swapping]

    loads = [value for run in runs for value in run["load_average"]]
    lines = [
        "# Swaps and kills under load",
        "",
        head,
        "",
        f"`pollard drill swap`, a model of {megabytes:g} MB, load {load}; {len(runs)} drills, each "
        f"with services of its own. Load average of the machine before and after them: "
        f"{min(loads):.1f} to {max(loads):.1f}, {statistics.median(loads):.1f} in the median. "
        f"{thrown} more were thrown away because their own process had been stopped meanwhile.",
        "",
        "| | | goal |",
        "|---|---|---|",
        f"| requests | {total('requests'):,} | |",
        f"| failed | {total('failed')} | 0 |",
        f"| answered wrongly, or by the revision before | {total('wrong') + total('stale')} | 0 |",
        f"| swaps | {total('swaps'):,} | |",
    ]
    if swapping:
        ratios = [found["p99_ratio"] for found in swapping if found["p99_ratio"]]
        lines += [
            f"| requests a second | {spread((f['rate_per_second'] for f in swapping), unit='')} "
            "| |",
            f"| until every server answered by it, p50 | {spread(of('swap_answering_ms', 'p50'))} "
            f"| ≤ {_allowed_ms(megabytes):.0f} ms |",
            f"| … p99 | {spread(of('swap_answering_ms', 'p99'))} | "
            f"≤ {_allowed_ms(megabytes):.0f} ms |",
            "| p99 within 250 ms of a swap | "
            f"{spread(of('latency_in_swaps_ms', 'p99'), '.1f')} | |",
            f"| p99 out of swaps | {spread(of('latency_out_of_swaps_ms', 'p99'), '.1f')} | |",
            f"| ratio of the two | {spread(ratios, '.2f', '')} | ≤ {_ALLOWED_RATIO} |"
            if ratios
            else "| ratio of the two | – | |",
        ]
    kills = [kill for found in figures for kill in found["kills"]]
    if kills:
        for key, word in (("service", "of"), ("step", "in the middle of")):
            counts = {kill[key]: 0 for kill in kills}
            for kill in kills:
                counts[kill[key]] += 1
            listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            lines.append(f"| kills {word} | {listed} | |")
        lines += [
            f"| kills | {len(kills)} | |",
            f"| requests sent again to a killed server | {total('sent_again'):,} | |",
        ]
    problems = [problem for found in figures for problem in found["problems"]]
    lines += ["", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines).rstrip() + "\n"


def main(
    swaps: Annotated[int, typer.Option(help="How many.")] = 1000,
    kills: Annotated[int, typer.Option(help="How many, after the swaps.")] = 0,
    each: Annotated[int, typer.Option(min=1, help="Swaps of one drill.")] = 50,
    kills_each: Annotated[int, typer.Option(min=1, help="Kills of one drill.")] = 20,
    megabytes: Annotated[float, typer.Option(help="Size of the model.")] = 10.0,
    load: Annotated[str, typer.Option(help='Such as "70%", or "closed".')] = "70%",
    pause: Annotated[float, typer.Option(help="Between swaps, seconds.")] = 1.5,
    drain: Annotated[float, typer.Option(help="Of the services, seconds.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Decides the kills.")] = 0,
    name: Annotated[str, typer.Option(help="Of the result.")] = "swap-drill",
    work: Annotated[
        Path | None, typer.Option(help="Keeps the drills that were made; to go on later.")
    ] = None,
    most: Annotated[int | None, typer.Option(min=1, help="Drills to make now.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Run the drills and write the figures; exit with 1 when one did not pass or misses a goal.

    Goals of time are judged for an even load only.
    """
    before = environment()
    kept = work or Path(tempfile.mkdtemp(prefix="pollard-bench-")) / "runs.jsonl"
    made = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    made_now = 0
    for words in _plan(swaps, kills, each, kills_each, seed):
        arguments = [*words, "--model-mb", str(megabytes), "--load", load]
        arguments += ["--pause", str(pause), "--drain", str(drain), "--max-time", "4h"]
        while not any(run["arguments"] == arguments and not run["stood_still"] for run in made):
            if most is not None and made_now >= most:
                raise SystemExit(f"{made_now} drills made; the others are left for later")
            made_now += 1
            made.append(_drill(arguments))
            with kept.open("a") as file:
                file.write(json.dumps(made[-1]) + "\n")
            if made[-1]["figures"] is None and not made[-1]["stood_still"]:
                raise SystemExit(f"the drill ended with {made[-1]['code']} and no figures")
    runs = [run for run in made if not run["stood_still"]]
    text = _text(runs, len(made) - len(runs), megabytes, load, heading(before))
    print(text)
    file = out / f"{name}-{time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    file.with_suffix(".json").write_text(
        json.dumps({"environment": before, "drills": made}, indent=1) + "\n"
    )
    if any(run["code"] for run in runs):
        raise SystemExit(1)
    # Where clients ask without pause, latency and swaps depend on how many they are.
    paced = [run["figures"] for run in runs if load != "closed" and not run["figures"]["kills"]]
    slow = any(found["swap_answering_ms"]["max"] > _allowed_ms(megabytes) for found in paced)
    if slow or any(found["p99_ratio"] and found["p99_ratio"] > _ALLOWED_RATIO for found in paced):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
