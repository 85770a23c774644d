"""`pollard predict`: ask a model about images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pollard.client import (
    DEFAULT_VISION_ADDRESS,
    InvalidArgument,
    Prediction,
    RequestFailed,
    ResourceExhausted,
    ScoredLabel,
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
from pollard.client.cli._pictures import Pictures
from pollard.client.environment import connection

# A request's deadline must do for all of a batch; half of a message leaves room for the rest.
_BATCH_IMAGES = 16
_BATCH_BYTES = 32 * 1024**2


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
    augmentation: Annotated[
        str | None,
        typer.Option(
            "--augment",
            metavar="flip|five_crop",
            help="Average over the image and its mirror image, or over five crops.",
        ),
    ] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option(
            "--score-threshold",
            metavar="SCORE",
            min=0,
            max=1,
            help="Leave out boxes with a lower score; by default what the bundle says.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="With --draw: paint which parts of the image the best label rests on. Asks the "
            "model hundreds of times; give --timeout what that takes.",
        ),
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(
            "--draw",
            metavar="PATH",
            help="Paint the answer over the image and write it to this PNG or JPEG file; with "
            "several images, into this directory.",
        ),
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
    """Ask a model about images. A bad image does not keep the others from being answered.

    Classifiers answer with labels, detectors with boxes in pixels of the upright image,
    segmentations with the share of the image that each class takes; --draw shows boxes and masks.
    """
    if revision is not None and alias is not None:
        raise typer.BadParameter("give --revision or --alias, not both")
    if augmentation not in (None, "flip", "five_crop"):
        raise typer.BadParameter("--augment is flip or five_crop")
    if explain and draw is None:
        raise typer.BadParameter("--explain paints a picture: give --draw, too")
    pictures = Pictures(draw, images) if draw is not None else None
    answers: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    failed = 0
    boxes = False
    with VisionClient(server, timeout=timeout, **connection()) as client:
        ask = functools.partial(
            client.predict_batch,
            model=model,
            revision=revision,
            alias=alias,
            top_k=top_k,
            augmentation=augmentation,
            score_threshold=score_threshold,
        )
        for image, answer in _answers(images, ask):
            if not isinstance(answer, Prediction):
                failed += 1
                fail(f"{image}: {answer}")
                answers.append({"image": str(image), "error": str(answer)})
                continue
            reasons = None
            if explain and answer.labels:
                try:
                    reasons = client.explain(
                        image,
                        model,
                        revision=answer.revision,
                        class_index=answer.labels[0].index,
                        overlay=True,
                    )
                except RequestFailed as error:
                    failed += 1
                    fail(f"{image}: no explanation: {error}")
            written = pictures.add(image, answer, reasons) if pictures is not None else None
            answers.append(_json(image, answer, written))
            rows += _rows(image, answer)
            boxes |= answer.objects is not None
    if as_json:
        print_json(answers)
    elif len(answers) > failed:
        place = ["BOX"] if boxes else []
        show_table(["IMAGE", "LABEL", "SCORE", *place, "MODEL", "REVISION"], rows)
        if pictures is not None:
            pictures.tell()
    if failed or (pictures is not None and pictures.failed):
        raise typer.Exit(1)


def _answers(
    images: list[Path], ask: Callable[[list[bytes]], list[Prediction | RequestFailed]]
) -> Iterator[tuple[Path, Prediction | Exception]]:
    """Ask for several images at once; yield an answer or an error for each, in their order."""
    for batch in _batches(images):
        good = [content for _, content in batch if isinstance(content, bytes)]
        try:
            answers = iter(ask(good) if good else [])
        except (InvalidArgument, ResourceExhausted):
            # One image may be too much for the server where the others are not.
            answers = iter([_one(ask, content) for content in good])
        for image, content in batch:
            yield image, next(answers) if isinstance(content, bytes) else content


def _one(
    ask: Callable[[list[bytes]], list[Prediction | RequestFailed]], content: bytes
) -> Prediction | RequestFailed:
    try:
        return ask([content])[0]
    except (InvalidArgument, ResourceExhausted) as error:
        return error


def _batches(images: list[Path]) -> Iterator[list[tuple[Path, bytes | OSError]]]:
    batch: list[tuple[Path, bytes | OSError]] = []
    size = 0
    for image in images:
        content: bytes | OSError
        try:
            content = image.read_bytes()
        except OSError as error:
            content = error
        length = len(content) if isinstance(content, bytes) else 0
        if batch and (len(batch) == _BATCH_IMAGES or size + length > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((image, content))
        size += length
    if batch:
        yield batch


def _json(image: Path, answer: Prediction, drawn: Path | None) -> dict[str, Any]:
    values = plain(dataclasses.replace(answer, mask=None))
    # A mask has as many numbers as the image has pixels; --draw shows it.
    del values["mask"]
    picture = {"drawn": str(drawn)} if drawn is not None else {}
    return {"image": str(image), **values, **picture}


def _rows(image: Path, answer: Prediction) -> list[list[str]]:
    """Return a row for each label; only the first names the image."""
    found: list[tuple[str, str, list[str]]]
    if answer.objects is not None:
        found = [
            (
                _name(each.label),
                f"{each.label.score:.4f}",
                [f"{each.x1:.0f},{each.y1:.0f} - {each.x2:.0f},{each.y2:.0f}"],
            )
            for each in answer.objects
        ] or [("nothing found", "", [""])]
    elif answer.mask is not None:
        found = [(_name(each), f"{each.score:.1%}", []) for each in answer.areas]
    elif answer.labels:
        found = [(_name(each), f"{each.score:.4f}", []) for each in answer.labels]
    else:
        length = 0 if answer.embedding is None else len(answer.embedding)
        found = [(f"vector of {length} numbers, see --json", "", [])]
    return [
        [
            str(image) if rank == 0 else "",
            name,
            score,
            *place,
            answer.model if rank == 0 else "",
            str(answer.revision) if rank == 0 else "",
        ]
        for rank, (name, score, place) in enumerate(found)
    ]


def _name(label: ScoredLabel) -> str:
    return label.label or str(label.index)
