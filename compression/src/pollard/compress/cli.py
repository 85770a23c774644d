"""The commands `compress` and `bundle`; the others are in `cli_*` beside this.

Nothing heavy is imported before a command runs: this module is loaded whenever
`pollard` starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pollard.compress.cli_common import (
    MAX_SEED,
    MAX_THREADS,
    Device,
    errors,
    make_reporter,
    make_spec,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

_Model = Annotated[
    str,
    typer.Argument(
        help="zoo:NAME, package.module:factory, or FILE.onnx, which is packed as it is.",
        show_default=False,
    ),
]
_Weights = Annotated[
    str, typer.Option("--weights", help="Trained parent: .pt state dict or .safetensors.")
]
_Out = Annotated[Path, typer.Option("--out", help="Directory of the bundle.", show_default=False)]
_Sign = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY",
        help="Sign the bundle with this private key (`pollard keys create` makes one). A "
        "passphrase is taken from POLLARD_KEY_PASSPHRASE, or asked for.",
        show_default=False,
    ),
]
_Seed = Annotated[
    int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of every random choice.")
]
_Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=MAX_THREADS, help="PyTorch's threads; default all cores."),
]
_Json = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file, for machines.")
]
_Force = Annotated[bool, typer.Option("--force", help="Replace what --out holds.")]
_Size = Annotated[
    str | None,
    typer.Option("--input-size", help="HEIGHTxWIDTHxCHANNELS; needed for a factory's model."),
]
_Mean = Annotated[
    str, typer.Option("--mean", help="Of pixels scaled to 0-1; one value, or one per channel.")
]
_Std = Annotated[str, typer.Option("--std", help="Likewise.")]
_TrainImages = Annotated[
    int | None, typer.Option("--train-images", min=2, help="Use only so many training images.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    from pollard.compress.cli_eval import evaluate
    from pollard.compress.cli_profile import profile
    from pollard.compress.cli_train import train
    from pollard.compress.cli_zoo import zoo

    app.command("compress")(compress)
    app.command("profile")(profile)
    app.command("bundle")(bundle)
    app.command("train")(train)
    app.command("eval")(evaluate)
    app.command("zoo")(zoo)


def compress(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="zoo:NAME, package.module:factory, or FILE.onnx, which can only be quantized; or "
            "in the recipe.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="digits, shapes, or a directory or zip with train/CLASS/* and test/CLASS/*, or "
            "CLASS/*; or in the recipe.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory of the bundle.", show_default=False)
    ] = None,
    recipe_path: Annotated[
        Path | None,
        typer.Option("--recipe", help="Recipe in YAML or JSON; flags go before what it says."),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option("--init", help="Write a commented recipe with these flags, and end."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done, if it can be, and how long."),
    ] = False,
    weights: _Weights = "",
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="cpu-int8 (float files compete, too), cpu-fp32, or cuda-fp16: judged on the GPU "
            "if there is one, else in emulation and without times.",
        ),
    ] = "cpu-int8",
    prune: Annotated[
        float,
        typer.Option("--prune", help="Share of the MACs to remove, 0 to 1; 0 does not prune."),
    ] = 0.5,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            help="Instead of --prune: latency=0.4, macs=, params= or size= of the parent's float "
            "file, or an amount such as latency=1.5ms; repeatable. Widths and residual blocks are "
            "chosen by measured latency.",
        ),
    ] = None,
    search: Annotated[
        int,
        typer.Option(
            "--search",
            min=0,
            metavar="N",
            help="Instead of --prune and --budget: try N points between latency and accuracy and "
            "compress to the fastest that holds --max-drop.",
        ),
    ] = 0,
    ray: Annotated[
        str,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run the trials of --search on the Ray cluster at HOST:PORT (its nodes need "
            "pollard-compression[ray] and processors like this one's); local: on this machine.",
        ),
    ] = "",
    importance: Annotated[
        str, typer.Option("--importance", help="How channels are ranked: l1, l2, bn or taylor.")
    ] = "l2",
    prune_steps: Annotated[
        int, typer.Option("--prune-steps", min=1, help="Cuts on the way to a budget.")
    ] = 2,
    remove_blocks: Annotated[
        bool,
        typer.Option(
            "--remove-blocks/--keep-blocks", help="Whether residual blocks may go for a budget."
        ),
    ] = True,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Most accuracy that may be lost, in points.")
    ] = 1.0,
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=0, help="Epochs of recovery; default by model.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of recovery; default by model.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="Of recovery; default by model.")
    ] = None,
    calibration_images: Annotated[
        int, typer.Option("--calibration-images", min=1, help="For 8-bit ranges.")
    ] = 512,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            help="How 8-bit ranges are chosen: min-max, mse, percentile-99.999, percentile-99.99, "
            "percentile-99.9; auto compares them.",
        ),
    ] = "auto",
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize/--no-equalize", help="Whether channels may be balanced for 8 bits."
        ),
    ] = True,
    correct_biases: Annotated[
        bool,
        typer.Option(
            "--correct-biases/--no-correct-biases",
            help="Whether biases may make up for what rounding moves.",
        ),
    ] = True,
    float_layers: Annotated[
        bool,
        typer.Option(
            "--float-layers/--no-float-layers",
            help="Whether layers may stay float where 8 bits miss the gate.",
        ),
    ] = True,
    qat_epochs: Annotated[
        int | None,
        typer.Option(
            "--qat-epochs",
            min=0,
            help="Epochs of training in 8 bits where nothing else holds the gate; 0: never; "
            "default by model.",
        ),
    ] = None,
    vnni: Annotated[
        bool | None,
        typer.Option(
            "--vnni/--no-vnni", help="Whether the serving machines have VNNI; default as here."
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(
            "--max-time",
            metavar="MINUTES",
            help="What the run may take, about: search, recovery and training in 8 bits end with "
            "what they have, then files are measured.",
            show_default="no limit",
        ),
    ] = None,
    factorize: Annotated[
        float | None,
        typer.Option(
            "--factorize",
            metavar="SHARE",
            help="Two dense layers of a lower rank (SVD) in place of one, where that saves weights "
            "and time; they keep this share of the squared weights, such as 0.9. 0: never.",
            show_default="only where a budget is met best so",
        ),
    ] = None,
    keep_whole: Annotated[
        list[str] | None, typer.Option("--keep-whole", help="Layer not to prune; repeatable.")
    ] = None,
    train_images: _TrainImages = None,
    seed: _Seed = 0,
    threads: _Threads = None,
    device: Device = "auto",
    input_size: _Size = None,
    mean: _Mean = "0",
    std: _Std = "1",
    sign: _Sign = None,
    json_file: _Json = None,
    force: _Force = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="Where finished stages and tables of latencies are kept; default POLLARD_CACHE, "
            "or ~/.cache/pollard.",
            show_default=False,
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Make every stage anew, whatever is kept.")
    ] = False,
) -> None:
    """Prune, recover, quantize and verify a trained model; write the fastest bundle that holds.

    Ends with exit code 3 and no bundle when nothing holds --max-drop and is
    faster than the parent. Stopped at any moment, it goes on when the same
    command is given again: finished stages are kept, recovery to the step.
    """
    if cache is not None:
        os.environ["POLLARD_CACHE"] = str(cache.absolute())
    with errors(json_file, _stages_kept) as console:
        from pollard.compress import recipe_file
        from pollard.compress.errors import UsageInvalid

        flags = {
            "model": model,
            "data": data,
            "weights": weights,
            "target": target,
            "prune": prune,
            "budget": tuple(budget or ()),
            "search": search,
            "importance": importance,
            "prune_steps": prune_steps,
            "remove_blocks": remove_blocks,
            "max_drop": max_drop,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "calibration_images": calibration_images,
            "calibration": calibration,
            "equalize": equalize,
            "correct_biases": correct_biases,
            "float_layers": float_layers,
            "qat_epochs": qat_epochs,
            "vnni": vnni,
            "max_time": max_time,
            "max_train_images": train_images,
            "keep_whole": tuple(keep_whole or ()),
            "factorize": factorize,
            "seed": seed,
            "threads": threads,
            "device": device,
        }
        if budget and _given(context, "prune"):
            raise UsageInvalid("--prune and --budget exclude each other; --budget macs= is a share")
        if search and _given(context, "prune"):
            raise UsageInvalid("--prune and --search exclude each other; a search cuts by latency")
        if ray and not search and recipe_path is None:
            raise UsageInvalid("--ray runs the trials of a search: give --search N, too")
        fields = recipe_file.read(recipe_path) if recipe_path else {}
        if fields.get("spec") is not None:
            fields["spec"] = recipe_file.make_spec(fields["spec"])
        fields |= {
            _FIELD_OF.get(name, name): flags[_FIELD_OF.get(name, name)]
            for name in context.params
            if _given(context, name) and _FIELD_OF.get(name, name) in flags
        }
        if (size := make_spec(input_size, mean, std)) is not None:
            fields["spec"] = size
        if str(fields.get("model", "")).endswith(".onnx"):
            fields.setdefault("prune", 0.0)  # there is nothing to prune in it
        if init is not None:
            if init.exists() and not force:
                raise UsageInvalid(f"{init} exists; choose another name, or --force to replace it")
            from pollard.compress.recipe import Recipe

            Recipe(**{"model": "", "data": "", "weights": "", **fields})
            init.write_text(recipe_file.render(fields), encoding="utf-8")
            console.print(f"Recipe: {init}", highlight=False, markup=False)
            return
        for name, flag in (("model", "MODEL"), ("data", "--data")):
            if not fields.get(name):
                raise UsageInvalid(f"give {flag}, or a --recipe that has {name}")
        if out is None and not dry_run:
            raise UsageInvalid("give --out, the directory of the bundle")
        from pollard.compress import pipeline
        from pollard.compress.recipe import Recipe

        recipe = Recipe(**{"weights": "", **fields})
        if dry_run:
            from pollard.compress.plan import make_plan

            plan = make_plan(recipe)
            for line in plan.lines(recipe):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            raise typer.Exit(0 if plan.speed_is_met else 3)
        if out is None:
            return
        make_signature = _signer(sign)
        result = pipeline.compress(
            recipe,
            out,
            force=force,
            fresh=fresh,
            ray=ray,
            sign=make_signature,
            reporter=make_reporter(console),
        )
        write_json(json_file, result.report)
        _print_comparison(console, result.report)
        console.print(
            f"Bundle: {out}\nReport: {out / 'report.html'}", highlight=False, markup=False
        )
        _say_signed(console, result.signed_by)
        reused = sum(done.reused for done in result.stages.done)
        console.print(
            f"Stages: {reused} of {len(result.stages.done)} were finished before; all that are "
            f"kept take {result.stages.size_bytes / 1e6:,.1f} MB in {result.stages.folder}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


# Parameters of the command that are called otherwise in recipes.
_FIELD_OF = {"train_images": "max_train_images"}


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def bundle(
    model: _Model,
    out: _Out,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="Judges the bundle: digits, shapes, or a directory or zip with train/CLASS/* and "
            "test/CLASS/*, or CLASS/*.",
        ),
    ] = "",
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            help="Instead of --data, where it is not here: a text file with one label a line. "
            "The bundle then claims no accuracy.",
        ),
    ] = None,
    weights: _Weights = "",
    seed: _Seed = 0,
    threads: _Threads = None,
    input_size: _Size = None,
    mean: _Mean = "0",
    std: _Std = "1",
    keep_weights: Annotated[
        bool,
        typer.Option(
            "--keep-weights",
            help="Keep the network's weights in the bundle, for pollard train --from BUNDLE.",
        ),
    ] = False,
    sign: _Sign = None,
    json_file: _Json = None,
    force: _Force = False,
) -> None:
    """Pack a trained model as it is, in float: verified and measured, without any gate."""
    with errors(json_file) as console:
        from pollard.compress import packing, pipeline
        from pollard.compress.errors import UsageInvalid
        from pollard.compress.recipe import Recipe

        if bool(data) == (labels is not None):
            raise UsageInvalid("give either --data, or --labels where the data are not here")
        make_signature = _signer(sign)
        if labels is not None:
            made = packing.pack(
                model, labels, out, weights=weights, spec=make_spec(input_size, mean, std),
                threads=threads, force=force, keep_weights=keep_weights,
                reporter=make_reporter(console),
            )  # fmt: skip
            signed = make_signature(out) if make_signature is not None else ""
            variant = made.manifest.variants[0].measurement
            figures = {"size_bytes": variant.size_bytes, "macs": variant.macs}
            write_json(json_file, {"kind": "bundle", "bundle": str(out), "summary": figures})
            console.print(
                f"{variant.size_bytes:,} bytes; without data no accuracy was measured\n"
                f"Bundle: {out}",
                highlight=False,
                markup=False,
            )
            _say_signed(console, signed)
            return
        recipe = Recipe(
            model=model,
            data=data,
            weights=weights,
            target="cpu-fp32",
            prune=0.0,
            seed=seed,
            threads=threads,
            spec=make_spec(input_size, mean, std),
        )
        result = pipeline.bundle_parent(
            recipe, out, force=force, keep_weights=keep_weights, reporter=make_reporter(console)
        )
        signed = make_signature(out) if make_signature is not None else ""
        write_json(json_file, result.report)
        found = result.measured.accuracy
        console.print(
            f"{found.title} {found}, {result.measured.latency_us:.1f} µs an image, "
            f"{result.report['summary']['size_bytes']:,} bytes\n"
            f"Bundle: {out}\nReport: {out / 'report.html'}",
            highlight=False,
            markup=False,
        )
        _say_signed(console, signed)


def _signer(key: Path | None) -> Callable[[Path], str] | None:
    from pollard.client.cli.signing import signer

    return signer(key)


def _say_signed(console: Console, fingerprint: str) -> None:
    if fingerprint:
        console.print(
            f"Signed with the key {fingerprint}", highlight=False, markup=False, soft_wrap=True
        )


def _stages_kept() -> str:
    return "finished stages are kept, and the same command goes on from there"


def _print_comparison(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table

    from pollard.compress import report_device, report_parts

    parent, chosen = report["parent"], report["chosen"]
    drop, speed = chosen["drop_points"], chosen["speedup"]
    table = Table(title=f"{report['name']}: {report['summary']['shipped']} is shipped")
    for column in ("", "parent", "compressed", "change"):
        table.add_column(column, justify="left" if not column else "right")
    accuracy = [f"{side['accuracy']['value']:.2%}" for side in (parent, chosen)]
    table.add_row(
        f"{parent['accuracy']['metric']} (n = {parent['accuracy']['samples']})",
        *accuracy,
        f"{0.0 - drop['estimate']:+.2f} points "
        f"({0.0 - drop['upper']:+.2f} to {0.0 - drop['lower']:+.2f})",
    )
    for before, after in zip(parent["latency"], chosen["latency"], strict=True):
        times = report_device.times_faster(report, before, after)
        judged = before["batch_size"] == chosen["judged_batch"]
        bound = f" (lower bound {speed['lower']:.2f})" if judged else ""
        table.add_row(
            f"latency, batch {before['batch_size']}",
            f"{before['p50_us']:.1f} µs",
            f"{after['p50_us']:.1f} µs",
            f"{report_parts.faster(times)}{bound}",
        )
    if not chosen["latency"]:
        table.add_row("latency on a GPU", "–", "–", "not measured")
    for title, key in (
        ("model.onnx, bytes", "size_bytes"),
        ("parameters", "parameters"),
        ("MACs", "macs"),
    ):
        table.add_row(
            title,
            f"{parent[key]:,}",
            f"{chosen[key]:,}",
            f"× {chosen[key] / parent[key]:.3f}",
        )
    console.print(table)
    if why := report["device"]["why_not"]:
        console.print(
            f"Not timed: {why}. Whether it is faster on a GPU is not known: compress it there, or "
            "measure it there, before it goes into service.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    for stage in report["dropped_stages"]:
        console.print(
            f"Without the stage {stage['stage']}: {stage['why']}.", highlight=False, markup=False
        )
