"""Ask a model of any kind about the same images: PyTorch, ONNX, a bundle, or a server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.client import ImageLike, Prediction
from pollard.client.environment import connection
from pollard.compress import accelerator
from pollard.compress.data import PartName, load_part, part_items
from pollard.compress.errors import DataInvalid, LabelsMismatch, UsageInvalid
from pollard.compress.evaluate import Predict, predict_part, session_predictor, torch_predictor
from pollard.compress.models import device_for, load_model, resolve
from pollard.compress.pipeline import require_weights, torch_threads
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.runtime.bundle import MANIFEST, Bundle
from pollard.runtime.errors import ImageInvalid
from pollard.runtime.machine import Machine, select_variant
from pollard.runtime.postprocess import activate
from pollard.runtime.sessions import Session, check_signature, open_session
from pollard.runtime.transforms import Pipeline

# As a server's batches usually are; the images of a batch travel in one message.
BATCH = 16


@dataclass(frozen=True)
class Answers:
    """What a model answered to one part of a data set."""

    source: str
    """Who answered, for people."""
    scores: NDArray[np.float64]
    """Probabilities [n, classes], in the order of the part."""
    labels: NDArray[np.int64]
    """True classes [n]."""
    classes: list[str]
    dataset: str
    """Name of the part."""
    damaged: list[str]
    """Files that were left out, each with the reason."""


def answer(
    model: str,
    data: str | Path,
    *,
    weights: str = "",
    server: str = "",
    spec: InputSpec | None = None,
    part: PartName = "held-out",
    threads: int | None = None,
    device: str = "auto",
    batch_size: int = BATCH,
    reporter: Reporter | None = None,
) -> Answers:
    """Ask a model about one part of a data set.

    Args:
        model: A bundle's directory, an `.onnx` file, a model as for
            :func:`pollard.compress.models.resolve`; with ``server``, a served model's name,
            "NAME" or "NAME:REVISION".
        data: As for :func:`pollard.compress.data.load_data`.
        weights: Of a model that is neither a bundle nor a file nor served.
        server: Address of a vision service.
        spec: What a factory's model or an `.onnx` file with float input takes.
        part: Which images.
        threads: PyTorch's or ONNX Runtime's.
        device: Of a PyTorch model, as for :func:`pollard.compress.accelerator.find`.
        batch_size: Images of a call.
        reporter: Told of progress.

    Raises:
        CompressionError: the model or the data cannot be used.
        RuntimeFault: the bundle or file cannot be used on this machine.
        PollardError: the server refuses.
    """
    reporter = reporter or Reporter()
    if server:
        return _ask_server(model, data, server, part, batch_size, reporter)
    path = Path(model)
    if path.is_dir() or (path / MANIFEST).exists():
        return _ask_bundle(Bundle.open(path), data, part, batch_size, threads, reporter)
    if path.suffix == ".onnx":
        return _ask_file(path, data, spec, part, batch_size, threads, reporter)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        raise UsageInvalid(
            f"{model} holds weights, not a model: give zoo:NAME or package.module:factory, and "
            f"--weights {model}"
        )
    source = resolve(model, spec)
    require_weights(weights, source)
    place = device_for(source, device, reporter)
    with torch_threads(threads), accelerator.on(place):
        images, classes, damaged = load_part(data, source.spec, part, reporter=reporter)
        loaded = load_model(source, weights, classes=len(classes))
        logits = predict_part(torch_predictor(loaded.module, source.spec), images, batch_size)
    scores = activate(logits.astype(np.float64), bundle_pb2.ACTIVATION_SOFTMAX)
    return Answers(source.reference, scores, images.labels, classes, images.name, damaged)


def _ask_bundle(
    bundle: Bundle,
    data: str | Path,
    part: PartName,
    batch_size: int,
    threads: int | None,
    reporter: Reporter,
) -> Answers:
    manifest = bundle.manifest
    variant = select_variant(manifest, Machine.detect())
    session = open_session(
        bundle.model_path(variant), target=variant.target, intra_op_threads=threads or 1
    )
    check_signature(session, manifest)
    task = manifest.postprocess.classification
    if not task.output:
        raise UsageInvalid(f"{bundle.path} is no classifier")
    images, classes, damaged = load_part(data, Pipeline(manifest.preprocess), part, reporter)
    check_labels(bundle.labels, classes)
    logits = predict_part(session_predictor(session), images, batch_size)
    scores = activate(logits.astype(np.float64), task.activation)
    return Answers(
        f"{manifest.name} ({variant.target})", scores, images.labels, classes, images.name, damaged
    )


def _ask_file(
    path: Path,
    data: str | Path,
    spec: InputSpec | None,
    part: PartName,
    batch_size: int,
    threads: int | None,
    reporter: Reporter,
) -> Answers:
    session = open_session(path, target="cpu-fp32", intra_op_threads=threads or 1)
    takes, prepare = file_input(path, session, spec)
    images, classes, damaged = load_part(data, takes, part, reporter)
    name, output = session.inputs[0].name, session.outputs[0].name

    def predict(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.asarray(session.run({name: prepare(pixels)}, [output])[output], np.float32)

    fixed = session.raw.get_inputs()[0].shape[0]
    ask = _by_batches_of(fixed, predict) if isinstance(fixed, int) else predict
    logits = predict_part(ask, images, batch_size)
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise LabelsMismatch(
            f"{path} answers {list(logits.shape[1:])} for an image; the data have "
            f"{len(classes)} classes"
        )
    scores = activate(logits.astype(np.float64), bundle_pb2.ACTIVATION_SOFTMAX)
    return Answers(path.name, scores, images.labels, classes, images.name, damaged)


def _by_batches_of(size: int, predict: Predict) -> Predict:
    """Return what asks for ``size`` images at a time, however many there are."""

    def by_batches(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        answers = []
        for start in range(0, len(pixels), size):
            piece = pixels[start : start + size]
            whole = np.resize(piece, (size, *piece.shape[1:]))
            answers.append(predict(whole)[: len(piece)])
        return np.concatenate(answers)

    return by_batches


def file_input(
    path: Path, session: Session, spec: InputSpec | None
) -> tuple[InputSpec, Callable[[NDArray[np.uint8]], NDArray[np.generic]]]:
    """Tell what a plain file takes, from its only input and what the user says of it."""
    if len(session.inputs) != 1 or len(session.inputs[0].shape) != 4:
        raise UsageInvalid(f"{path} has not one input of four dimensions; is it an image model?")
    shape, kind = session.inputs[0].shape[1:], session.inputs[0].datatype
    pixels = kind == "UINT8"
    height, width, channels = shape if pixels else (*shape[1:], shape[0])
    if spec is None:
        if not pixels or min(height, width, channels) < 1:
            raise UsageInvalid(
                f"{path} takes {kind} {list(shape)}: give --input-size HEIGHTxWIDTHxCHANNELS, "
                "--mean and --std"
            )
        spec = InputSpec(height, width, channels, (0.0,) * channels, (1.0,) * channels)
    stated = zip((height, width, channels), spec.shape, strict=True)
    if any(own not in (-1, given) for own, given in stated):
        raise UsageInvalid(f"{path} takes {kind} {list(shape)}, not {spec.shape}")
    if pixels:
        return spec, lambda images: images
    return spec, lambda images: spec.normalize(images).numpy()


def _ask_server(
    model: str, data: str | Path, server: str, part: PartName, batch_size: int, reporter: Reporter
) -> Answers:
    from pollard.client import RequestFailed, VisionClient

    name, revision = served_name(model)
    source, classes, items = part_items(data, part)
    index = {label: i for i, label in enumerate(classes)}
    rows: list[NDArray[np.float64]] = []
    labels: list[int] = []
    damaged: list[str] = []
    served: set[int] = set()
    with VisionClient(server, **connection()) as vision, ThreadPoolExecutor(2) as pool:

        def ask(start: int) -> list[Prediction | str]:
            """Return an answer for each image of a batch, or why there is none."""
            contents: list[ImageLike] = []
            places: list[int] = []
            answers: list[Prediction | str] = [""] * len(items[start : start + batch_size])
            for place, item in enumerate(items[start : start + batch_size]):
                try:
                    contents.append(source.read(item))
                    places.append(place)
                except ImageInvalid as error:
                    answers[place] = str(error)
            if not contents:
                return answers
            given = vision.predict_batch(contents, name, revision=revision, top_k=len(classes) + 1)
            for place, found in zip(places, given, strict=True):
                if isinstance(found, RequestFailed):
                    if not found.reason.startswith("IMAGE_"):
                        raise found
                    answers[place] = str(found)
                else:
                    answers[place] = found
            return answers

        with reporter.step("Asking the server", len(items)) as step:
            starts = range(0, len(items), batch_size)
            for start, batch in zip(starts, pool.map(ask, starts), strict=True):
                for item, found in zip(items[start : start + batch_size], batch, strict=True):
                    if isinstance(found, str):
                        damaged.append(f"{item.path}: {found}")
                        continue
                    rows.append(_served_scores(found, classes, model))
                    labels.append(index[item.label])
                    served.add(found.revision)
                step.advance(len(batch))
    if not rows:
        raise DataInvalid(f"no image of {data} could be used: {'; '.join(damaged[:10])}")
    if len(served) > 1:
        raise UsageInvalid(
            f"revisions {', '.join(map(str, sorted(served)))} answered, so the figures belong to "
            f"none of them; name one, such as {name}:{max(served)}"
        )
    return Answers(
        f"{name} revision {served.pop()} at {server}",
        np.stack(rows),
        np.array(labels, np.int64),
        classes,
        f"{source.name}/{part}",
        damaged,
    )


def served_name(model: str) -> tuple[str, int | None]:
    """Read NAME or NAME:REVISION.

    Raises:
        UsageInvalid: it is neither.
    """
    name, colon, revision = model.partition(":")
    if colon and not revision.isdecimal():
        raise UsageInvalid(f"{model!r} is not NAME or NAME:REVISION of a served model")
    return name, int(revision) if colon else None


def _served_scores(found: Prediction, classes: list[str], model: str) -> NDArray[np.float64]:
    scores = np.full(len(classes), np.nan)
    if len(found.labels) != len(classes):
        raise LabelsMismatch(
            f"{model} answers {len(found.labels)} classes; the data have {len(classes)}"
        )
    for label in found.labels:
        if label.label and label.label != classes[label.index]:
            raise LabelsMismatch(
                f"class {label.index} of {model} is {label.label!r}, of the data "
                f"{classes[label.index]!r}"
            )
        scores[label.index] = label.score
    return scores


def check_labels(labels: list[str], classes: list[str]) -> None:
    """Raise LabelsMismatch where a bundle's labels are not the data's classes."""
    if labels and labels != classes:
        raise LabelsMismatch(
            f"the bundle's labels are {', '.join(labels[:20])}; the data's classes are "
            f"{', '.join(classes[:20])}"
        )
