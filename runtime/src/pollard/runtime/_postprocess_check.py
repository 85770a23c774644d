"""Whether a manifest's postprocessing can be carried out."""

from __future__ import annotations

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import ManifestInvalid


def check_postprocess(manifest: bundle_pb2.Manifest) -> None:
    """Check the outputs that it names, thresholds and colours.

    Raises:
        ManifestInvalid: with the field and the reason.
    """
    task = manifest.postprocess.WhichOneof("task")
    if task is None:
        return
    message = getattr(manifest.postprocess, task)
    outputs = {spec.name: spec for spec in manifest.outputs}
    for field in message.DESCRIPTOR.fields:
        if not (field.name == "output" or field.name.endswith("_output")):
            continue
        name = getattr(message, field.name)
        if name and name not in outputs:
            raise _refusal(task, field.name, f"the model has no output {name!r}")
    if task == "detection":
        _check_detection(manifest.postprocess.detection, outputs)
    elif task == "segmentation":
        _check_palette(manifest.postprocess.segmentation)


def _check_detection(
    message: bundle_pb2.Detection, outputs: dict[str, bundle_pb2.TensorSpec]
) -> None:
    for field in ("boxes_output", "scores_output"):
        if not getattr(message, field):
            raise _refusal("detection", field, "not set")
    boxes = list(outputs[message.boxes_output].shape)
    if len(boxes) != 3 or boxes[2] not in (4, -1):
        raise _refusal("detection", "boxes_output", f"its shape is {boxes}, not [batch, boxes, 4]")
    wanted = 2 if message.labels_output else 3
    for field in ("scores_output", "labels_output"):
        name = getattr(message, field)
        if name and len(outputs[name].shape) != wanted:
            raise _refusal(
                "detection",
                field,
                f"its shape is {list(outputs[name].shape)}, which is not of {wanted} dimensions",
            )
    for field in ("score_threshold", "iou_threshold"):
        value = getattr(message, field)
        if not 0 <= value <= 1:
            raise _refusal("detection", field, f"{value:g} is not between 0 and 1")


def _check_palette(message: bundle_pb2.Segmentation) -> None:
    if (
        len(message.palette) % 3
        or len(message.palette) > 3 * 256
        or max(message.palette, default=0) > 255
    ):
        raise _refusal(
            "segmentation", "palette", "it takes three values of 0 to 255 for each of 256 classes"
        )


def _refusal(task: str, field: str, why: str) -> ManifestInvalid:
    name = f"postprocess.{task}.{field}"
    return ManifestInvalid(f"manifest: {name}: {why}", field=name)
