"""`pollard predict`: ask a model about images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pollard.client import (
    DEFAULT_VISION_ADDRESS,
    InvalidArgument,
    Prediction,
    ResourceExhausted,
    VisionClient,
)
from pollard.client._channel import checked_address
from pollard.client._names import checked_model
from pollard.client.cli._common import (
    AliasOption,
    JsonOption,
    RevisionOption,
    TimeoutOption,
    checked_by,
    fail,
    plain,
    print_json,
    show_table,
)


def register(app: typer.Typer) -> None:
    """Add `pollard predict`."""
    app.command()(predict)


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...",
            help="Image files: JPEG, PNG, WebP, AVIF, GIF, TIFF or BMP.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="MODEL", help="Model name.", callback=checked_by(checked_model)
        ),
    ],
    revision: RevisionOption = None,
    alias: AliasOption = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", min=1, help="Number of labels.")
    ] = None,
    as_json: JsonOption = False,
    server: Annotated[
        str,
        typer.Option(
            "--server",
            metavar="HOST:PORT",
            envvar="POLLARD_VISION_ADDRESS",
            help="Address of the preprocess and vision service.",
            callback=checked_by(checked_address),
        ),
    ] = DEFAULT_VISION_ADDRESS,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Ask a model about images. A bad image does not keep the others from being answered."""
    if revision is not None and alias is not None:
        raise typer.BadParameter("give --revision or --alias, not both")
    answers: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    failed = 0
    with VisionClient(server, timeout=timeout) as client:
        for image in images:
            try:
                answer = client.predict(image, model, revision=revision, alias=alias, top_k=top_k)
            except (InvalidArgument, ResourceExhausted, OSError) as error:
                failed += 1
                fail(f"{image}: {error}")
                answers.append({"image": str(image), "error": str(error)})
                continue
            answers.append({"image": str(image), **plain(answer)})
            rows += _rows(image, answer)
    if as_json:
        print_json(answers)
    elif len(answers) > failed:
        show_table(["IMAGE", "LABEL", "SCORE", "MODEL", "REVISION"], rows)
    if failed:
        raise typer.Exit(1)


def _rows(image: Path, answer: Prediction) -> list[list[str]]:
    """Return a row for each label; only the first names the image."""
    rows = []
    for rank, label in enumerate(answer.labels):
        first = rank == 0
        rows.append(
            [
                str(image) if first else "",
                label.label or str(label.index),
                f"{label.score:.4f}",
                answer.model if first else "",
                str(answer.revision) if first else "",
            ]
        )
    return rows
