"""What `pollard drill chaos` prints at its end."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table


def show_chaos(found: dict[str, Any]) -> None:
    """Print the figures as a table on standard output."""
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title="Chaos", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("requests", f"{found['requests']} in {found['seconds']:.0f} s")
    for name, key in (
        ("failed", "failed"),
        ("answered as another revision would", "wrong"),
        ("answered by the revision before", "stale"),
    ):
        table.add_row(name, str(found[key]), style="bold red" if found[key] else "bold green")
    table.add_row("sent again while something was broken", str(found["sent_again"]))
    latency = found["latency_ms"]
    table.add_row(
        "latency, faults included",
        f"p50 {latency['p50']:.1f}, p99 {latency['p99']:.0f}, longest {latency['max']:.0f} ms",
    )
    for kind, seconds in found["recovery_seconds"].items():
        table.add_row(
            f"{kind}, {seconds['count']} times: until it had recovered",
            f"median {seconds['median']:.2f}, longest {seconds['longest']:.2f} s",
        )
    for kind in found["left_out"]:
        table.add_row(f"{kind}", "left out")
    for name, memory in found["memory_mib"].items():
        table.add_row(
            f"memory of {name}",
            f"{memory['first']:.0f} → {memory['last']:.0f} MiB ({memory['growth']:+.1f})",
        )
    console.print(table)
    for kind, why in found["left_out"].items():
        console.print(f"Left out: {kind}. {why}", markup=False, soft_wrap=True)
    for problem in found["problems"]:
        console.print(f"  {problem}", style="red", markup=False, soft_wrap=True)
    if found["stopped"]:
        console.print(found["stopped"], style="yellow", markup=False, soft_wrap=True)
    console.print(f"Seed {found['seed']}.")
    if found["passed"]:
        console.print("Passed: every request was answered rightly, and everything recovered.")
    else:
        console.print("Not passed.", style="bold red")
