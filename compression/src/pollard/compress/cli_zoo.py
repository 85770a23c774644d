"""The command `zoo`. Light, as :mod:`pollard.compress.cli` is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def zoo(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the list to this file, for machines.")
    ] = None,
) -> None:
    """List the networks of the zoo: parameters, MACs of an image, and what they take."""
    from pollard.compress.cli_common import errors, write_json

    with errors(json_file) as console:
        from rich.table import Table

        from pollard.compress.budget import amount
        from pollard.compress.zoo import ENTRIES
        from pollard.compress.zoo.figures import describe

        rows = [describe(entry) for entry in ENTRIES.values()]
        write_json(json_file, {"models": rows})
        # Without lines: the last column has room left beside 80 characters.
        table = Table(box=None, pad_edge=False)
        table.add_column("model", no_wrap=True)
        for column in ("params", "MACs", "classes", "input"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        for row in rows:
            table.add_row(
                f"zoo:{row['name']}",
                amount("params", row["parameters"]),
                amount("macs", row["macs"]),
                str(row["classes"]),
                "×".join(str(row["input"][side]) for side in ("height", "width", "channels")),
                row["summary"],
            )
        console.print(table)
