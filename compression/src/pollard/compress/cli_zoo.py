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

        from pollard.compress.zoo import ENTRIES
        from pollard.compress.zoo.figures import describe

        rows = [describe(entry) for entry in ENTRIES.values()]
        write_json(json_file, {"models": rows})
        table = Table()
        table.add_column("model", no_wrap=True)
        for column in ("parameters", "MACs", "classes"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("takes")
        for row in rows:
            table.add_row(
                f"zoo:{row['name']}",
                f"{row['parameters']:,}",
                f"{row['macs']:,}",
                str(row["classes"]),
                row["summary"],
            )
        console.print(table)
