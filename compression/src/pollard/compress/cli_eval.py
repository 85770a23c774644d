"""The command `eval`. Light, as :mod:`pollard.compress.cli` is."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pollard.compress.cli_common import MAX_THREADS, Device


def _checked_server(value: str) -> str:
    if value:
        from pollard.client._channel import checked_address

        try:
            checked_address(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return value


class PartChoice(StrEnum):
    """Parts of a data set."""

    HELD_OUT = "held-out"
    CHOOSE = "choose"
    TRAIN = "train"
    ALL = "all"


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Bundle directory, FILE.onnx, zoo:NAME, or package.module:factory; with "
            "--server, the name of a served model, or NAME:REVISION.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="digits, shapes, or a directory or zip with train/CLASS/* and test/CLASS/*, or "
            "CLASS/*.",
            show_default=False,
        ),
    ],
    weights: Annotated[
        str, typer.Option("--weights", help="Of a model of the zoo or a factory.")
    ] = "",
    server: Annotated[
        str,
        typer.Option(
            "--server",
            metavar="ADDRESS",
            help="Ask this vision service, such as 127.0.0.1:8011, with the images as they are.",
            callback=_checked_server,
        ),
    ] = "",
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="Compare with this second model.")
    ] = "",
    against_weights: Annotated[
        str, typer.Option("--against-weights", help="Weights of the second model.")
    ] = "",
    part: Annotated[
        PartChoice, typer.Option("--part", help="Images to judge by.")
    ] = PartChoice.HELD_OUT,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=256, help="Images of a call.")
    ] = 16,
    input_size: Annotated[
        str | None,
        typer.Option(
            "--input-size",
            help="HEIGHTxWIDTHxCHANNELS; needed for a factory's model and float .onnx files.",
        ),
    ] = None,
    mean: Annotated[
        str, typer.Option("--mean", help="Of pixels scaled to 0-1; one value, or one per channel.")
    ] = "0",
    std: Annotated[str, typer.Option("--std", help="Likewise.")] = "1",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, max=MAX_THREADS, help="Threads of a call; PyTorch takes all cores."
        ),
    ] = None,
    device: Device = "auto",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Write mistakes and calibration to this .html file."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, for machines.")
    ] = None,
) -> None:
    """Judge a classifier, a detector or a segmenter, by what its answers are.

    Classifiers: accuracy, precision, recall, F1, mistakes, calibration. Detectors: mean average
    precision as COCO counts it. Segmenters: mean intersection over union.

    The images are those that training and compression keep apart, unless --part
    says otherwise. A served model is sent the image files themselves; its figures
    are those of the bundle that it was pushed as.
    """
    from pollard.compress.cli_common import (
        check_files,
        errors,
        make_reporter,
        make_spec,
        write_json,
    )

    with errors(json_file) as console:
        check_files(plot)
        from pollard.compress import evaluation, evaluation_page
        from pollard.runtime.bundle import write_durably

        found = evaluation.evaluate(
            model,
            data,
            weights=weights,
            server=server,
            against=against,
            against_weights=against_weights,
            spec=make_spec(input_size, mean, std),
            part=part.value,
            threads=threads,
            device=device,
            batch_size=batch_size,
            reporter=make_reporter(console),
        )
        write_json(json_file, found.to_json())
        if plot is not None:
            plot.parent.mkdir(parents=True, exist_ok=True)
            write_durably(plot, evaluation_page.render(found).encode())
        console.print(evaluation_page.rich_table(found))
        for line in evaluation_page.lines(found):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if plot is not None:
            console.print(f"Plots: {plot}", highlight=False, markup=False)
