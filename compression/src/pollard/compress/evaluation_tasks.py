"""Judge detectors and segmenters of any kind: PyTorch, ONNX, a bundle, or a server.

Boxes and masks are compared in pixels of the images as they are, after the same way from outputs
to answers that a server goes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.client import Prediction, RequestFailed, VisionClient
from pollard.client.environment import connection
from pollard.compress import accelerator
from pollard.compress.answers import check_labels, file_input, served_name
from pollard.compress.average_precision import Boxes, pairs
from pollard.compress.data import Part, PartName, load_part, part_items
from pollard.compress.errors import DataDamaged, LabelsMismatch, UsageInvalid
from pollard.compress.evaluate import (
    OUTPUT,
    Accuracy,
    Drop,
    predict_part,
    torch_predictor,
    wilson_share,
)
from pollard.compress.models import device_for, load_model, resolve
from pollard.compress.pipeline import require_weights, torch_threads
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import task_of
from pollard.compress.tasks.base import Resampled
from pollard.compress.tasks.detection import (
    BOXES,
    JUDGED_SCORE,
    SCORES,
    Precision,
    boxes_of,
    confuse_boxes,
    judge_boxes,
)
from pollard.compress.tasks.segmentation import (
    Mask,
    Overlaps,
    confuse_masks,
    judge_masks,
    mask_of,
)
from pollard.compress.truth import TaskName, Truth
from pollard.runtime.bundle import MANIFEST, Bundle
from pollard.runtime.machine import Machine, select_variant
from pollard.runtime.sessions import Session, check_signature, open_session
from pollard.runtime.transforms import Geometry, Pipeline

# Boxes of a lower score are doubtful and not counted where mistakes are.
_SHOWN_SCORE = 0.4

_TASKS: dict[str, TaskName] = {
    "classification": "classification",
    "detection": "detection",
    "segmentation": "segmentation",
}


@dataclass(frozen=True)
class Found:
    """What a model found in one part of a data set."""

    source: str
    """Who answered, for people."""
    task: TaskName
    part: Part
    """With the truth."""
    classes: list[str]
    damaged: list[str]
    boxes: Sequence[Boxes] = ()
    """Of each image, in pixels of the image; with all that are not hopeless."""
    masks: Sequence[Mask] = ()
    """Of each image, of its size."""

    @property
    def verdict(self) -> Resampled:
        """How right it is."""
        if self.task == "detection":
            return judge_boxes(self.boxes, self.part, len(self.classes))
        return judge_masks(self.masks, self.part, len(self.classes))

    @property
    def sure(self) -> list[Boxes]:
        """The boxes that would be shown."""
        return [each[each[:, 5] >= _SHOWN_SCORE] for each in self.boxes]


@dataclass(frozen=True)
class TaskEvaluation:
    """How good boxes or masks are."""

    model: str
    task: TaskName
    accuracy: Accuracy
    """mAP or mIoU, with the bootstrap's interval over the images."""
    figures: dict[str, float]
    """Further ones, by name."""
    classes: list[dict[str, Any]]
    """Figures of each class: `label`, then by name; None where there is none of it."""
    confusion: NDArray[np.int64]
    """How often class i was answered with class j: objects, and pixels."""
    confusion_labels: list[str]
    damaged: list[str]
    """Files that were left out, each with the reason."""
    compared: dict[str, Any] | None = None
    """Agreement with a second model, and the second model's figure."""

    def to_json(self) -> dict[str, Any]:
        """Return all figures."""
        return {
            "model": self.model,
            "task": self.task,
            "accuracy": self.accuracy.to_json(),
            "figures": self.figures,
            "classes": self.classes,
            "confusion": self.confusion.tolist(),
            "confusion_labels": self.confusion_labels,
            "damaged": self.damaged,
            "compared": self.compared,
        }


def judge(first: Found, second: Found | None = None) -> TaskEvaluation:
    """Return the figures of what was found, and how they compare with a second model's.

    Raises:
        DataDamaged: the two were not asked about the same images.
    """
    verdict = first.verdict
    accuracy = verdict.accuracy(first.part)
    classes, labels = len(first.classes), task_of(first.task).confusion_labels(first.classes)
    if isinstance(verdict, Precision):
        rows, figures = _precisions(verdict, first.classes)
        confusion = confuse_boxes(first.sure, first.part, classes)
    else:
        assert isinstance(verdict, Overlaps)  # noqa: S101 - there is no third
        rows, figures = _overlaps(verdict, first.classes)
        confusion = confuse_masks(first.masks, first.part, classes)
    compared = None if second is None else _compare(first, second, verdict)
    return TaskEvaluation(
        first.source, first.task, accuracy, figures, rows, confusion, labels, first.damaged,
        compared,
    )  # fmt: skip


def find(
    model: str,
    data: str | Path,
    task: TaskName,
    *,
    weights: str = "",
    server: str = "",
    spec: InputSpec | None = None,
    part: PartName = "held-out",
    threads: int | None = None,
    device: str = "auto",
    batch_size: int = 16,
    reporter: Reporter | None = None,
) -> Found:
    """Ask a detector or segmenter about one part of a data set.

    Args:
        model: As for :func:`pollard.compress.answers.answer`, as the others.
        data: As for :func:`pollard.compress.data.load_data`.
        task: What the model is for; see :func:`kind_of`.
        weights: Of a model that is neither a bundle nor a file nor served.
        server: Address of a vision service.
        spec: What a factory's model or an `.onnx` file with float input takes.
        part: Which images.
        threads: Of one call.
        device: Of a PyTorch model, as for :func:`pollard.compress.accelerator.find`.
        batch_size: Images of a call.
        reporter: Told of progress.

    Raises:
        CompressionError, RuntimeFault, PollardError: as for it.
    """
    reporter = reporter or Reporter()
    if server:
        return _ask_server(model, data, task, server, part, batch_size, reporter)
    path = Path(model)
    if path.is_dir() or (path / MANIFEST).exists():
        bundle = Bundle.open(path)
        variant = select_variant(bundle.manifest, Machine.detect())
        session = open_session(
            bundle.model_path(variant), target=variant.target, intra_op_threads=threads or 1
        )
        check_signature(session, bundle.manifest)
        images, classes, damaged = load_part(
            data, Pipeline(bundle.manifest.preprocess), part, reporter, task=task
        )
        check_labels(bundle.labels, classes)
        title = f"{bundle.manifest.name} ({variant.target})"
        outputs = _run(session, images, batch_size)
        return _found(title, bundle.manifest, outputs, images, classes, damaged)
    if path.suffix == ".onnx":
        session = open_session(path, target="cpu-fp32", intra_op_threads=threads or 1)
        takes, prepare = file_input(path, session, spec)
        images, classes, damaged = load_part(
            data, replace(takes, letterbox=True), part, reporter, task=task
        )
        manifest = _manifest_of(session, task, path)
        outputs = _run(session, images, batch_size, prepare)
        return _found(path.name, manifest, outputs, images, classes, damaged)
    source = resolve(model, spec)
    require_weights(weights, source)
    manifest = bundle_pb2.Manifest()
    task_of(task).describe(manifest, ())
    place = device_for(source, device, reporter)
    with torch_threads(threads), accelerator.on(place):
        images, classes, damaged = load_part(data, source.spec, part, reporter, task=task)
        loaded = load_model(source, weights, classes=len(classes))
        answers = predict_part(torch_predictor(loaded.module, source.spec), images, batch_size)
    packed: Iterator[dict[str, NDArray[np.generic]]] = (
        {BOXES: one[None, :, :4], SCORES: one[None, :, 4:]}
        if task == "detection"
        else {OUTPUT: one[None]}
        for one in answers
    )
    return _found(source.reference, manifest, packed, images, classes, damaged)


def kind_of(model: str, server: str, spec: InputSpec | None) -> TaskName:
    """Return what a model is for, as :func:`find` takes it.

    Raises:
        UsageInvalid: it gives no answers that can be judged.
        CompressionError, RuntimeFault, PollardError: there is no such model, or it is unusable.
    """
    path = Path(model)
    if server:
        return _served_kind(model, server)
    if path.is_dir() or (path / MANIFEST).exists():
        name = Bundle.open(path).manifest.postprocess.WhichOneof("task") or "none"
        if name not in _TASKS:
            raise UsageInvalid(
                f"{path} is a bundle for {name}; classes, boxes and masks can be judged"
            )
        return _TASKS[name]
    if path.suffix == ".onnx":
        if not path.is_file():
            return "classification"  # whose reader says what is wrong
        shapes = [len(output.shape) for output in open_session(path, target="cpu-fp32").outputs]
        if shapes == [3, 3]:
            return "detection"
        return "segmentation" if shapes == [4] else "classification"
    if path.suffix in (".pt", ".pth", ".safetensors"):
        return "classification"  # likewise
    return resolve(model, spec).task


def _found(
    source: str,
    manifest: bundle_pb2.Manifest,
    outputs: Iterator[dict[str, NDArray[np.generic]]],
    part: Part,
    classes: list[str],
    damaged: list[str],
) -> Found:
    found = Found(source, part.task, part, classes, damaged)
    if part.task == "detection":
        boxes = [
            boxes_of(each, manifest, truth.geometry, JUDGED_SCORE)
            for each, truth in zip(outputs, part.truths, strict=True)
        ]
        return replace(found, boxes=boxes)
    height, width = part.images.shape[1:3]
    masks = [
        mask_of(each, manifest, truth.geometry, (width, height))
        for each, truth in zip(outputs, part.truths, strict=True)
    ]
    return replace(found, masks=masks)


def _run(
    session: Session, part: Part, batch_size: int, prepare: Any = None
) -> Iterator[dict[str, NDArray[np.generic]]]:
    """Yield the outputs of each image."""
    name = session.inputs[0].name
    for images, _ in part.batches(batch_size):
        outputs = session.run({name: images if prepare is None else prepare(images)})
        for place in range(len(images)):
            yield {key: np.asarray(value)[place : place + 1] for key, value in outputs.items()}


def _manifest_of(session: Session, task: TaskName, path: Path) -> bundle_pb2.Manifest:
    """Describe a plain file by the shapes of its outputs."""
    manifest = bundle_pb2.Manifest()
    task_of(task).describe(manifest, ())
    if task == "segmentation":
        manifest.postprocess.segmentation.output = session.outputs[0].name
        return manifest
    names = {output.name: output.shape for output in session.outputs}
    boxes = [name for name, shape in names.items() if shape[2] == 4]
    if names.keys() != {BOXES, SCORES} and len(boxes) != 1:
        raise UsageInvalid(
            f"{path} has outputs {', '.join(names)}: it cannot be told which are the boxes; make "
            "it a bundle, or call them boxes and scores"
        )
    if names.keys() != {BOXES, SCORES}:
        manifest.postprocess.detection.boxes_output = boxes[0]
        (manifest.postprocess.detection.scores_output,) = names.keys() - {boxes[0]}
    return manifest


def _served_kind(model: str, server: str) -> TaskName:
    name, revision = served_name(model)
    grey = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(grey, "PNG")
    # No service says what a model is for; its answer does.
    with VisionClient(server, **connection()) as vision:
        told = vision.predict(grey.getvalue(), name, revision=revision)
    if told.objects is not None:
        return "detection"
    return "segmentation" if told.mask is not None else "classification"


def _ask_server(
    model: str,
    data: str | Path,
    task: TaskName,
    server: str,
    part: PartName,
    batch_size: int,
    reporter: Reporter,
) -> Found:
    name, revision = served_name(model)
    source, classes, items = part_items(data, part, task)
    served: set[int] = set()
    answers: list[Prediction] = []
    truths: list[Truth] = []
    damaged: list[str] = []
    with (
        VisionClient(server, **connection()) as vision,
        reporter.step("Asking the server", len(items)) as step,
    ):
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            contents = [source.read(item) for item in batch]
            given = vision.predict_batch(
                contents, name, revision=revision, score_threshold=JUDGED_SCORE
            )
            for item, answer in zip(batch, given, strict=True):
                if isinstance(answer, RequestFailed):
                    if not answer.reason.startswith("IMAGE_"):
                        raise answer
                    damaged.append(f"{item.path}: {answer}")
                    continue
                _check_served(answer, classes, model)
                served.add(answer.revision)
                answers.append(answer)
                truths.append(_served_truth(source, item, answer))
            step.advance(len(batch))
    if len(served) > 1:
        raise UsageInvalid(
            f"revisions {', '.join(map(str, sorted(served)))} answered, so the figures belong to "
            f"none of them; name one, such as {name}:{max(served)}"
        )
    nothing = np.zeros((len(truths), 0, 0, 3), np.uint8)
    asked = Part(f"{source.name}/{part}", nothing, np.zeros(len(truths)), task, truths)
    title = f"{name} revision {served.pop()} at {server}" if served else name
    found = Found(title, task, asked, classes, damaged)
    if task == "segmentation":
        return replace(found, masks=[a.mask for a in answers if a.mask is not None])
    rows = [
        [(o.x1, o.y1, o.x2, o.y2, o.label.index, o.label.score) for o in a.objects or ()]
        for a in answers
    ]
    return replace(found, boxes=[np.array(row, np.float64).reshape(-1, 6) for row in rows])


def _served_truth(source: Any, item: Any, answer: Prediction) -> Truth:
    known = source.truth(item)
    # Answers are about the upright image already.
    geometry = Geometry(*(answer.size or (0, 0)))
    if known.dtype == np.uint8:
        return Truth(geometry, mask=known)
    return Truth(geometry, boxes=known)


def _check_served(answer: Prediction, classes: list[str], model: str) -> None:
    labels = [o.label for o in answer.objects or ()] + list(answer.areas)
    for label in labels:
        known = classes[label.index] if label.index < len(classes) else ""
        if label.label and label.label != known:
            raise LabelsMismatch(
                f"class {label.index} of {model} is {label.label!r}, of the data {known!r}"
            )


def _precisions(
    verdict: Precision, classes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    table = verdict.matches.precisions()
    objects = verdict.matches.objects.sum(axis=0)
    rows = [
        {
            "label": label,
            "AP50-95": _known(table[i].mean()),
            "AP50": _known(table[i, 0]),
            "AP75": _known(table[i, 5]),
            "objects": int(objects[i]),
        }
        for i, label in enumerate(classes)
    ]
    known = table[~np.isnan(table[:, 0])]
    if not len(known):
        return rows, {"mAP50": 0.0, "mAP75": 0.0}
    return rows, {"mAP50": float(known[:, 0].mean()), "mAP75": float(known[:, 5].mean())}


def _overlaps(
    verdict: Overlaps, classes: list[str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    shares = verdict.by_class()
    both, _, true = (verdict.counts[..., i].sum(axis=0) for i in range(3))
    rows = [
        {
            "label": label,
            "IoU": _known(shares[i]),
            "recall": float(both[i] / true[i]) if true[i] else None,
            "pixels": int(true[i]),
        }
        for i, label in enumerate(classes)
    ]
    return rows, {"pixel accuracy": float(both.sum() / max(1, true.sum()))}


def _known(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


def _compare(first: Found, second: Found, verdict: Resampled) -> dict[str, Any]:
    if len(first.part) != len(second.part):
        raise DataDamaged(
            f"{first.source} answered {len(first.part)} images and {second.source} "
            f"{len(second.part)}: not every file can be read by both"
        )
    other = second.verdict
    lost: Drop = verdict.drop_from(other)
    same, total = _same(first, second)
    return {
        "model": second.source,
        "accuracy": other.accuracy(second.part).to_json(),
        "same_answer": asdict(wilson_share(same, total, first.part.name)),
        "difference_points": {
            "estimate": 0.0 - lost.points, "lower": 0.0 - lost.upper, "upper": 0.0 - lost.lower
        },
    }  # fmt: skip


def _same(first: Found, second: Found) -> tuple[float, float]:
    if first.task == "segmentation":
        equal = [float((a == b).mean()) for a, b in zip(first.masks, second.masks, strict=True)]
        return sum(equal), float(len(equal))
    same = total = 0.0
    for own, other in zip(first.sure, second.sure, strict=True):
        same += sum(own[i, 4] == other[j, 4] for i, j in pairs(own, other))
        total += max(len(own), len(other))
    return same, max(total, 1.0)
