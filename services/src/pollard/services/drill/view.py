"""What a drill shows while it runs, and at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pollard.services.drill.figures import Record
from pollard.services.drill.options import AROUND_SECONDS

# Drawing takes processor time from the clients whose latencies are measured.
_DRAWN_PER_SECOND = 2
_LINES = 10
"""Lines for each part where there is no terminal to draw a bar in."""


class View:
    """Progress on standard error: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, record: Record) -> None:
        """Show what `record` says."""
        self._record = record
        self._console = Console(file=sys.stderr, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[seen]}"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=_DRAWN_PER_SECOND,
            transient=True,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> View:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Write one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def part(self, name: str, total: int) -> Callable[[], None]:
        """Begin a part of so many steps; return what is to be called after each."""
        task = self._bar.add_task(name, total=total, seen=self._seen())
        done = 0

        def advanced() -> None:
            nonlocal done
            done += 1
            self._bar.update(task, advance=1, seen=self._seen())
            if not self._console.is_terminal and done * _LINES // total > (
                (done - 1) * _LINES // total
            ):
                self.say(f"{name} {done} of {total}: {self._seen()}")

        return advanced

    def _seen(self) -> str:
        traffic = self._record.traffic
        bad = traffic.bad + len(self._record.problems)
        return (
            f"{traffic.total} requests, {bad} of them bad" if bad else f"{traffic.total} requests"
        )


def show(found: dict[str, Any]) -> None:
    """Print the figures as tables on standard output."""
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title="Drill", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    _requests(table, found)
    if found["swaps"]:
        _swaps(table, found)
    if found["kills"]:
        _kills(table, found)
    for name, memory in found["memory_mib"].items():
        table.add_row(
            f"memory of {name}",
            f"{memory['first']:.0f} → {memory['last']:.0f} MiB ({memory['growth']:+.1f})",
        )
    console.print(table)
    for problem in found["problems"]:
        console.print(f"  {problem}", style="red", markup=False, soft_wrap=True)
    if found["stopped"]:
        console.print(found["stopped"], style="yellow", markup=False, soft_wrap=True)
    if found["passed"]:
        console.print("Passed: every request was answered, and by the revision that it names.")
    else:
        console.print("Not passed.", style="bold red")


def _requests(table: Table, found: dict[str, Any]) -> None:
    def count(name: str, number: int) -> None:
        table.add_row(name, str(number), style="bold red" if number else "bold green")

    rate = found["rate_per_second"]
    capacity = f" of {found['capacity_per_second']:.0f}" if found["capacity_per_second"] else ""
    table.add_row("requests", str(found["requests"]))
    if rate:
        table.add_row("  a second", f"{rate:.0f}{capacity}")
    count("failed", found["failed"])
    count("answered as another revision would", found["wrong"])
    count("answered by the revision before", found["stale"])
    if found["late"]:
        table.add_row("sent late, the services being full", str(found["late"]))


def _swaps(table: Table, found: dict[str, Any]) -> None:
    def milliseconds(values: dict[str, float], *names: str) -> str:
        return ", ".join(f"{name} {values[name]:.1f}" for name in names) + " ms"

    table.add_row("swaps", str(found["swaps"]))
    table.add_row(
        "  until every server had the new routes",
        milliseconds(found["swap_ms"], "p50", "p99", "max"),
    )
    table.add_row(
        "  until every server answered by it",
        milliseconds(found["swap_answering_ms"], "p50", "p99", "max"),
    )
    inside, outside = found["latency_in_swaps_ms"], found["latency_out_of_swaps_ms"]
    around = f"{AROUND_SECONDS * 1e3:.0f} ms"
    table.add_row(f"latency within {around} of a swap", milliseconds(inside, "p50", "p99"))
    table.add_row("latency out of swaps", milliseconds(outside, "p50", "p99"))
    if found["p99_ratio"]:
        table.add_row("  ratio of the p99", f"{found['p99_ratio']:.2f}")


def _kills(table: Table, found: dict[str, Any]) -> None:
    kills = found["kills"]
    table.add_row("kills", str(len(kills)))
    for key in ("service", "step"):
        counts: dict[str, int] = {}
        for kill in kills:
            counts[kill[key]] = counts.get(kill[key], 0) + 1
        table.add_row(
            "  of" if key == "service" else "  in the middle of",
            ", ".join(f"{name} {number}" for name, number in sorted(counts.items())),
        )
    table.add_row("  requests sent again to a killed server", str(found["sent_again"]))
