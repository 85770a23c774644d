"""The command `profile`. Light, as :mod:`pollard.compress.cli` is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pollard.compress.cli_common import MAX_THREADS

_TARGETS = ("cpu-fp32", "cpu-int8")


def profile(
    model: Annotated[
        str, typer.Argument(help="zoo:NAME, or package.module:factory.", show_default=False)
    ],
    weights: Annotated[
        str,
        typer.Option(
            "--weights", help="Trained weights; latency hardly depends on them. Random without."
        ),
    ] = "",
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="digits, a directory, or a zip: how much each group of channels, block, dense "
            "layer and layer in 8 bits matters is then measured, too.",
            show_default=False,
        ),
    ] = "",
    sensitivity_images: Annotated[
        int,
        typer.Option("--sensitivity-images", min=8, help="Images of --data that are looked at."),
    ] = 256,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="cpu-fp32 or cpu-int8; repeatable, both by default."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=1024, help="Images of a call.")] = 1,
    runtime_threads: Annotated[
        int, typer.Option("--threads", min=1, max=MAX_THREADS, help="ONNX Runtime's threads.")
    ] = 1,
    again: Annotated[
        bool, typer.Option("--again", help="Measure anew what earlier runs have measured.")
    ] = False,
    input_size: Annotated[
        str | None,
        typer.Option("--input-size", help="HEIGHTxWIDTHxCHANNELS; needed for a factory's model."),
    ] = None,
    mean: Annotated[str, typer.Option("--mean", help="Of pixels scaled to 0-1.")] = "0",
    std: Annotated[str, typer.Option("--std", help="Likewise.")] = "1",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write interactive plots to this .html file.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, for machines.")
    ] = None,
) -> None:
    """Show MACs, parameters and measured latency of every layer of a model, on this machine.

    Each operator is timed by itself in ONNX Runtime, in float and in 8 bits; the
    sum is compared with the time of the whole file. Timings are kept in
    ~/.cache/pollard (or POLLARD_CACHE) for the next run, and so are the
    sensitivities that --data gives: nothing is trained for them.
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
        from pollard.compress.errors import UsageInvalid

        if data and not weights:
            raise UsageInvalid(
                "--data without --weights would tell how sensitive random weights are; give the "
                "trained weights"
            )
        targets = tuple(dict.fromkeys(target or _TARGETS))
        if unknown := sorted(set(targets) - set(_TARGETS)):
            raise UsageInvalid(
                f"target {unknown[0]!r} cannot be profiled; there are {', '.join(_TARGETS)}"
            )
        from pollard.compress.models import load_model, resolve
        from pollard.compress.profile import profile_module
        from pollard.compress.profile_page import render_profile, rich_sensitivity, rich_table
        from pollard.compress.report_plots import agreement_text
        from pollard.runtime.bundle import write_durably

        source = resolve(model, make_spec(input_size, mean, std))
        source.require_pytorch("a profile")
        reporter = make_reporter(console)
        parts = None
        if data:
            from pollard.compress.data import load_data
            from pollard.compress.profile_sensitivity import profile_sensitivity

            images = load_data(data, source.spec, task=source.task, reporter=reporter)
            loaded = load_model(source, weights, classes=len(images.classes))
            parts = profile_sensitivity(
                loaded, images, data, images=sensitivity_images, fresh=again, reporter=reporter
            )
        else:
            loaded = load_model(source, weights or None)
        found = profile_module(
            loaded.module,
            source.spec,
            name=source.name,
            targets=targets,
            batch=batch,
            threads=runtime_threads,
            again=again,
            reporter=reporter,
        ).to_json()
        if parts is not None:
            found["sensitivity"] = parts.to_json()
        write_json(json_file, found)
        console.print(rich_table(found))
        if parts is not None:
            console.print(rich_sensitivity(found["sensitivity"]))
        for each in found["targets"]:
            console.print(agreement_text(each), highlight=False, markup=False, soft_wrap=True)
        if plot is not None:
            write_durably(plot.absolute(), render_profile(found).encode())
            console.print(f"Plots: {plot}", highlight=False, markup=False)
