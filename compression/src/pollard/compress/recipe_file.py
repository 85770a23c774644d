"""Recipes as files, YAML or JSON: the fields of :class:`~pollard.compress.recipe.Recipe`.

The `recipe_json` that a bundle carries is such a file, too. Light: imported before
anything heavy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pollard.compress.errors import UsageInvalid

SCHEMA_VERSION = 1

_TEXT, _NUMBER, _COUNT, _SWITCH, _LIST = (
    "text",
    "a number",
    "a whole number",
    "true or false",
    "a list",
)

# Field → what it holds, whether null is possible, what the commented recipe says of it.
_FIELDS: dict[str, tuple[str, bool, str]] = {
    "model": (_TEXT, False, "zoo:NAME, package.module:factory, or FILE.onnx (quantized only)."),
    "data": (_TEXT, False, "digits, a directory, or a zip; relative to where the command runs."),
    "weights": (_TEXT, False, "The trained parent: a state dict (.pt) or .safetensors."),
    "target": (_TEXT, False, "cpu-int8 (float files compete, too), cpu-fp32 or cuda-fp16."),
    "prune": (_NUMBER, False, "Share of the MACs to remove, 0 to 1; 0 does not prune."),
    "budget": (
        _LIST,
        False,
        "Instead of prune: what the shipped file may take, such as [latency=0.4]; also macs, "
        "params\n# and size. Shares are of the parent's float file; latency=1.5ms and size=300kB "
        "work, too.",
    ),
    "search": (
        _COUNT,
        False,
        "Instead of prune and budget: trials of a search for the budget of latency; 0: none.",
    ),
    "importance": (_TEXT, False, "How channels are ranked: l1, l2, bn or taylor."),
    "prune_steps": (_COUNT, False, "Cuts on the way to a budget, with recovery between them."),
    "remove_blocks": (_SWITCH, False, "Whether whole residual blocks may go for a budget."),
    "max_drop": (_NUMBER, False, "Most accuracy that may be lost, in points."),
    "epochs": (_COUNT, True, "Epochs of recovery after pruning; null: by model."),
    "batch_size": (_COUNT, True, "Images per step of recovery; null: by model."),
    "learning_rate": (_NUMBER, True, "Peak learning rate of recovery; null: by model."),
    "distill_weight": (_NUMBER, False, "Share of the loss that follows the parent's answers."),
    "distill_temperature": (_NUMBER, False, "Softens those answers."),
    "calibration_images": (_COUNT, False, "Images that 8-bit ranges are measured on."),
    "calibration": (
        _TEXT,
        False,
        "How those ranges are chosen: min-max, mse, percentile-99.999, percentile-99.99,\n"
        "# percentile-99.9; auto compares them.",
    ),
    "equalize": (_SWITCH, False, "Whether channels may be balanced between layers for 8 bits."),
    "correct_biases": (_SWITCH, False, "Whether biases may make up for what rounding moves."),
    "float_layers": (_SWITCH, False, "Whether layers may stay float where 8 bits miss the gate."),
    "qat_epochs": (
        _COUNT,
        True,
        "Epochs of training in 8 bits where nothing else holds the gate; 0: never; null: by model.",
    ),
    "vnni": (_SWITCH, True, "Whether the serving machines have VNNI; null: as here."),
    "max_time": (_NUMBER, True, "Minutes that the run may take, about; null: as long as it takes."),
    "max_train_images": (_COUNT, True, "Use only so many training images; null: all."),
    "keep_whole": (_LIST, False, "Layers that are not pruned, by name."),
    "factorize": (
        _NUMBER,
        True,
        "Share of their squared weights that dense layers keep when two of a lower rank (SVD) "
        "take\n# their place, such as 0.9; 0: never; null: only where a budget is met best so.",
    ),
    "seed": (_COUNT, False, "Seed of every random choice."),
    "threads": (_COUNT, True, "PyTorch's threads; null: all cores."),
    "device": (
        _TEXT,
        False,
        "What PyTorch trains on: auto (a GPU where it can use one), cpu, cuda or cuda:N.",
    ),
    "spec": (
        "a mapping",
        True,
        "What a factory's model takes, such as {height: 64, width: 64, channels: 3,\n"
        "# mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}; null for zoo models.",
    ),
}
_SPEC = ("height", "width", "channels", "mean", "std", "augmentation", "short_side", "letterbox")


def read(path: Path) -> dict[str, Any]:
    """Read a recipe file.

    Returns:
        The fields that it states, ready for ``Recipe(**fields)``; `spec` is still
        a mapping.

    Raises:
        UsageInvalid: it is unreadable, from a newer version, or has keys or values
            that mean nothing; all of them are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageInvalid(f"the recipe {path} cannot be read: {error}") from error
    content = _parse(text, path)
    if not isinstance(content, dict):
        raise UsageInvalid(f"the recipe {path} is not a mapping of names to values")
    version = content.pop("schema_version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UsageInvalid(f"the recipe {path} lacks schema_version; write schema_version: 1")
    if version > SCHEMA_VERSION:
        raise UsageInvalid(
            f"the recipe {path} has schema_version {version}, this Pollard reads up to "
            f"{SCHEMA_VERSION}; install a newer Pollard, or write the recipe anew with --init"
        )
    problems = [_unknown(key, _FIELDS) for key in content if key not in _FIELDS]
    fields: dict[str, Any] = {}
    for key in _FIELDS.keys() & content.keys():
        kind, optional, _ = _FIELDS[key]
        fields[key], problem = _convert(content[key], kind, optional)
        if problem:
            problems.append(f"{key} is {content[key]!r}; it must be {problem}")
    spec = fields.get("spec")
    if isinstance(spec, dict):
        problems += [f"spec: {_unknown(key, _SPEC)}" for key in spec if key not in _SPEC]
    if problems:
        raise UsageInvalid(f"the recipe {path}: " + "; ".join(sorted(problems)))
    return fields


def _parse(text: str, path: Path) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageInvalid(f"the recipe {path} is not JSON: {error}") from error
    import yaml  # type: ignore[import-untyped]  # no types without another package

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageInvalid(f"the recipe {path} is not YAML: {error}") from error


def _unknown(key: object, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(key), list(known), 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return f"unknown key {key!r}, {hint}"


def _convert(value: Any, kind: str, optional: bool) -> tuple[Any, str]:
    """Return the value, and what it should have been if it is not that."""
    wanted = f"{kind} or null" if optional else kind
    if value is None and optional:
        return None, ""
    if kind == _NUMBER:
        # YAML 1.1 takes 1e-3 for text.
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return None, wanted
        return (number, "") if math.isfinite(number) else (None, wanted)
    if kind == _LIST:
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        return (tuple(value), "") if good else (None, "a list of names")
    classes = {_TEXT: str, _COUNT: int, _SWITCH: bool}
    good = isinstance(value, classes.get(kind, dict)) and (
        kind == _SWITCH or not isinstance(value, bool)
    )
    return (value, "") if good else (None, wanted)


def make_spec(fields: Mapping[str, Any]) -> Any:
    """Return the :class:`~pollard.compress.spec.InputSpec` of a recipe's `spec`.

    Raises:
        UsageInvalid: values are missing or impossible.
    """
    from pollard.compress.spec import InputSpec

    try:
        sizes = [int(fields[key]) for key in ("height", "width", "channels")]
        mean, std = (tuple(float(v) for v in fields[key]) for key in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageInvalid(
            "the recipe's spec needs height, width, channels, and lists mean and std: "
            f"{type(error).__name__} {error}"
        ) from error
    augmentation = fields.get("augmentation", "shift")
    if augmentation not in ("none", "shift", "crop-flip"):
        raise UsageInvalid(f"spec: augmentation {augmentation!r} is not none, shift or crop-flip")
    short_side = fields.get("short_side", 0)
    if not isinstance(short_side, int) or isinstance(short_side, bool):
        raise UsageInvalid(f"spec: short_side {short_side!r} is not a whole number of pixels")
    letterbox = fields.get("letterbox", False)
    if not isinstance(letterbox, bool):
        raise UsageInvalid(f"spec: letterbox {letterbox!r} is not true or false")
    return InputSpec(sizes[0], sizes[1], sizes[2], mean, std, augmentation, short_side, letterbox)


def render(values: Mapping[str, Any]) -> str:
    """Return a commented recipe in YAML: every field, with ``values`` or its default."""
    from pollard.compress.recipe import Recipe

    stated = {
        field.name: field.default
        for field in dataclasses.fields(Recipe)
        if field.default is not dataclasses.MISSING
    }
    stated = {
        "model": "zoo:small-cnn-28",
        "data": "digits",
        "weights": "parent.safetensors",
    } | stated
    stated.update(values)
    lines = [
        "# A recipe of Pollard: pollard compress --recipe THIS --out DIRECTORY",
        "# Flags of the command go before what stands here.",
        f"schema_version: {SCHEMA_VERSION}",
    ]
    for name, (_, _, comment) in _FIELDS.items():
        value = stated[name]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        # JSON is YAML, and quotes what must be quoted.
        lines += ["", f"# {comment}", f"{name}: {json.dumps(value)}"]
    return "\n".join(lines) + "\n"
