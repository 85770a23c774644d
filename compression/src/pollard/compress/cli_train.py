"""The command `train`. Light, as :mod:`pollard.compress.cli` is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pollard.compress.cli_common import MAX_SEED, MAX_THREADS, Device


def train(
    model: Annotated[
        str, typer.Argument(help="zoo:NAME, or package.module:factory.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="digits, shapes, shapes:COUNT:SEED, or a directory or zip with train/CLASS/* "
            "and test/CLASS/*, or CLASS/*.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Weights file to write, .safetensors.", show_default=False)
    ],
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Default by model.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=2, help="Of all processes together; default by model."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak; default by model.")
    ] = None,
    schedule: Annotated[
        str, typer.Option("--schedule", help="one-cycle, cosine, step or constant.")
    ] = "one-cycle",
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="adamw, adam or sgd; default by model.")
    ] = None,
    momentum: Annotated[float, typer.Option("--momentum", help="Of sgd.")] = 0.9,
    nesterov: Annotated[
        bool, typer.Option("--nesterov/--no-nesterov", help="Whether sgd looks ahead.")
    ] = True,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", min=0, help="Default by model.")
    ] = None,
    loss: Annotated[str, typer.Option("--loss", help="cross-entropy or mse.")] = "cross-entropy",
    label_smoothing: Annotated[
        float, typer.Option("--label-smoothing", help="Share spread over all classes.")
    ] = 0.0,
    augment: Annotated[
        str | None,
        typer.Option(
            "--augment",
            help="none, or a list such as flip,shift=0.1,rotation=15,crop=0.5,colour=0.2,"
            "mixup=0.2,cutmix=1; default by model.",
        ),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    ema: Annotated[
        float, typer.Option("--ema", help="Keep a mean of the weights with this decay; 0: none.")
    ] = 0.0,
    patience: Annotated[
        int, typer.Option("--patience", min=0, help="End after so many epochs without a better.")
    ] = 0,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE|BUNDLE",
            help="Begin from these weights of the same network, or those of a bundle made with "
            "--keep-weights; a head for other classes is replaced.",
        ),
    ] = None,
    freeze: Annotated[
        str, typer.Option("--freeze", help="backbone: only the head learns; or none.")
    ] = "none",
    unfreeze_every: Annotated[
        int,
        typer.Option(
            "--unfreeze-every", min=0, metavar="EPOCHS", help="One more block learns each so often."
        ),
    ] = 0,
    classes: Annotated[
        int | None, typer.Option("--classes", min=2, help="Classes that the data must have.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was killed, to the step.")
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option("--checkpoint-seconds", min=0, help="Least time between checkpoints.")
    ] = 30.0,
    max_time: Annotated[
        float | None,
        typer.Option(
            "--max-time",
            metavar="MINUTES",
            help="Take fewer steps where not all of them fit into this, about.",
        ),
    ] = None,
    curves: Annotated[
        Path | None, typer.Option("--curves", help="Write loss and accuracy to this .html file.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", help="Directory for TensorBoard's files.")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option(
            "--validation",
            metavar="SHARE|COUNT",
            help="Where the data have train/ and test/ only: choose the epoch by this share of "
            "train/, such as 0.1, or so many of its images; test/ as a whole then judges.",
        ),
    ] = None,
    train_images: Annotated[
        int | None, typer.Option("--train-images", min=2, help="Use only so many training images.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of every random choice.")
    ] = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, max=MAX_THREADS, help="PyTorch's threads; default all cores."
        ),
    ] = None,
    device: Device = "auto",
    ray: Annotated[
        str,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Share each batch with the cores of the Ray cluster at HOST:PORT; its nodes need "
            "pollard-compression[ray] and the data under the same path; local: of this machine.",
        ),
    ] = "",
    input_size: Annotated[
        str | None,
        typer.Option("--input-size", help="HEIGHTxWIDTHxCHANNELS; needed for a factory's model."),
    ] = None,
    mean: Annotated[
        str, typer.Option("--mean", help="Of pixels scaled to 0-1; one value, or one per channel.")
    ] = "0",
    std: Annotated[str, typer.Option("--std", help="Likewise.")] = "1",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file, for machines.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what --out holds.")] = False,
) -> None:
    """Train a model, from scratch or from other weights, and write its best epoch.

    Under torchrun the processes share each batch, each with a GPU of its own
    where there are GPUs:
    torchrun --nproc-per-node 2 --no-python pollard train ...
    """
    from pollard.compress.cli_common import (
        check_files,
        errors,
        make_reporter,
        make_spec,
        write_json,
    )

    def kept() -> str:
        from pollard.compress.checkpoint import checkpoint_beside

        path = checkpoint_beside(out)
        if not path.exists():
            return "nothing was written"
        return f"{path} is kept, and the same command with --resume goes on from there"

    with errors(json_file, kept) as console:
        check_files(curves)
        from pollard.compress import augmentation
        from pollard.compress import train as training
        from pollard.compress.errors import UsageInvalid

        if max_time is not None and not 0 < max_time < math.inf:
            raise UsageInvalid(f"--max-time is {max_time:g}; it is in minutes, above 0")
        options = training.TrainOptions(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            optimizer=cast(Any, optimizer),
            momentum=momentum,
            nesterov=nesterov,
            schedule=cast(Any, schedule),
            loss=cast(Any, loss),
            label_smoothing=label_smoothing,
            augment=None if augment is None else augmentation.parse(augment),
            bf16=bf16,
            ema=ema,
            patience=patience,
            start=start,
            freeze=cast(Any, freeze),
            unfreeze_every=unfreeze_every,
        )
        how: dict[str, Any] = {
            "max_train_images": train_images,
            "validation": validation,
            "seed": seed,
            "spec": make_spec(input_size, mean, std),
            "classes": classes,
            "max_seconds": math.inf if max_time is None else 60 * max_time,
        }
        here: dict[str, Any] = {
            "force": force,
            "checkpoint_seconds": checkpoint_seconds,
            "curves": curves,
            "tensorboard": tensorboard,
            "reporter": make_reporter(console),
        }
        if ray and threads is not None:
            raise UsageInvalid("--threads and --ray exclude each other: a process has one core")
        if ray and device not in ("auto", "cpu"):
            raise UsageInvalid(
                "on a Ray cluster every core of a processor trains; several GPUs are used with "
                "torchrun, as pollard train --help says"
            )
        if ray:
            from pollard.compress.cluster_training import train_on_cluster

            result = train_on_cluster(
                ray, model, data, out, options=options, resume=resume, here=here, **how
            )
        else:
            result = training.train(
                model,
                data,
                out,
                options=options,
                resume=resume,
                threads=threads,
                device=device,
                **here,
                **how,
            )
        if not training.leads():
            return
        write_json(json_file, result.to_json())
        found = result.accuracy
        console.print(f"{found.title} {found}\nWeights: {out}", highlight=False, markup=False)
