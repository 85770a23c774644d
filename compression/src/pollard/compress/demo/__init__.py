"""`pollard demo`: the whole way on real data, from training to swaps under load.

This module is imported by every `pollard` command, so it imports nothing heavy by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `pollard demo`."""
    app.command()(demo)


def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Where weights, bundles and reports are left."),
    ] = Path("pollard-demo"),
    seconds: Annotated[
        float, typer.Option(min=1.0, max=3600.0, help="How long requests are sent.")
    ] = 12.0,
    swaps: Annotated[
        int, typer.Option(min=1, max=1000, help="How often the served revision is swapped.")
    ] = 5,
    clients: Annotated[int, typer.Option(min=1, max=256, help="Concurrent clients.")] = 8,
    prune: Annotated[
        float, typer.Option(min=0.0, max=0.95, help="Share of the MACs to remove.")
    ] = 0.8,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of training; default by model.")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Use the bundles that --out holds, if it does.")
    ] = False,
) -> None:
    """Train a CNN on digits, compress it, serve it, and swap it under load.

    Everything is real: scikit-learn's handwritten digits, the three services as processes of their
    own, requests over gRPC. Each answer is compared with what the revision that it names answers
    offline. Ends with exit code 1 when a single request failed or was answered wrongly.
    """
    from pollard.compress.demo.command import DemoOptions, run_demo

    raise typer.Exit(
        run_demo(
            DemoOptions(
                json_file=json_file,
                out=out,
                seconds=seconds,
                swaps=swaps,
                clients=clients,
                prune=prune,
                epochs=epochs,
                reuse=reuse,
            )
        )
    )
