"""Find a model by name or import path and load its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pollard.compress import accelerator, factories
from pollard.compress.accelerator import placed
from pollard.compress.errors import (
    CompressionError,
    DeviceUnusable,
    LabelsMismatch,
    ModelUnknown,
    UsageInvalid,
    WeightsInvalid,
    first_line,
)
from pollard.compress.parallel import process_count
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import task_of
from pollard.compress.truth import TASKS, TaskName
from pollard.compress.zoo import ENTRIES, TrainDefaults, find
from pollard.compress.zoo.inception import InceptionV3
from pollard.runtime.digests import sha256_file

# Keys listed in a message about weights that do not fit.
_LISTED_KEYS = 20


@dataclass(frozen=True)
class Source:
    """A model that can be built, before it is."""

    reference: str
    """"zoo:NAME", "package.module:factory", or "onnx:FILE" without its folder."""
    spec: InputSpec
    training: TrainDefaults
    file: Path | None = None
    """The ONNX file that holds it; None for what is built in PyTorch."""

    @property
    def name(self) -> str:
        """Short name, for people."""
        name = self.reference.partition(":")[2]
        return name if self.file is None else name.removesuffix(".onnx")

    def require_pytorch(self, purpose: str) -> None:
        """Check that it can be taken apart.

        Raises:
            UsageInvalid: it is an ONNX file.
        """
        if self.file is not None:
            raise UsageInvalid(
                f"{self.reference.partition(':')[2]} is an ONNX file, which can be quantized and "
                f"packed; for {purpose} give the PyTorch model it was exported from"
            )

    @cached_property
    def task(self) -> TaskName:
        """What it is for; of a factory's model it is what its answers look like.

        Raises:
            ModelUnknown: there is no such model, or its answers are of no task.
        """
        kind, _, name = self.reference.partition(":")
        if kind == "zoo":
            return find(name).task
        outputs = _run(self.build(0), self)
        problems = []
        for task in TASKS:
            try:
                task_of(task).check(outputs, 2)
            except ModelUnknown as error:
                problems.append(f"for {task} it {error}")
            else:
                return task
        raise ModelUnknown(f"{self.reference}: {'; '.join(problems)}")

    def build(self, classes: int) -> nn.Module:
        """Build the module with fresh weights.

        Raises:
            ModelUnknown: the module or factory cannot be imported, or gives
                something else.
        """
        kind, _, name = self.reference.partition(":")
        if self.file is not None:
            from pollard.compress.onnx_file import OnnxModule, read_core

            return OnnxModule(read_core(self.file, self.spec), self.spec)
        if kind == "zoo":
            return find(name).build(classes)
        model = factories.build(kind, name)
        if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
            raise ModelUnknown(
                f"{self.reference} has lazy layers, whose weights have no size yet; let the "
                "factory run the model once on an example before it returns it"
            )
        return model


def device_for(source: Source, name: str, reporter: Reporter) -> torch.device:
    """Return the device of a name that a model can be computed on.

    Args:
        source: Which model.
        name: As for :func:`pollard.compress.accelerator.find`; "auto" is the processor where
            the GPU does not compute, or the model does not run on it.
        reporter: Told of that.

    Raises:
        DeviceUnusable: there is no such device, or the model does not run on it.
    """
    try:
        device = accelerator.find(name)
    except DeviceUnusable as error:
        # A process of several does not leave the others for another device.
        if name != "auto" or process_count() > 1:
            raise
        reporter.say(f"PyTorch computes on the processor: {error}")
        return accelerator.CPU
    # Only code that others wrote can make tensors in the processor's memory.
    if device == accelerator.CPU or source.file is not None or source.reference.startswith("zoo:"):
        return device
    try:
        with accelerator.on(device):
            _run(source.build(0), source)
    except CompressionError as error:
        # As it is given, or for another reason than the device.
        _run(source.build(0), source)
        why = f"the model does not run on {accelerator.describe(device)} ({first_line(error)})"
        if name != "auto":
            raise DeviceUnusable(f"{why}; give --device cpu") from error
        reporter.say(f"PyTorch computes on the processor: {why}")
        return accelerator.CPU
    return device


@dataclass
class LoadedModel:
    """A module with its weights."""

    module: nn.Module
    source: Source
    classes: int
    weights_digest: str
    """SHA-256 of the weights file; empty when there was none."""

    @property
    def spec(self) -> InputSpec:
        """What it takes."""
        return self.source.spec


def resolve(reference: str, spec: InputSpec | None = None) -> Source:
    """Find a model without building it.

    Args:
        reference: "zoo:NAME", the bare name of a zoo model,
            "package.module:factory" (the factory takes no arguments), or the path of an
            `.onnx` file, also behind "onnx:".
        spec: What the model takes; needed for factories and files, and instead of the
            zoo's own otherwise.

    Raises:
        ModelUnknown: there is no such model.
        UsageInvalid: the input of a factory's model is not stated.
    """
    if reference in ENTRIES:
        reference = f"zoo:{reference}"
    if reference.endswith(".onnx"):
        return _onnx_source(Path(reference.removeprefix("onnx:")), spec)
    kind, colon, name = reference.partition(":")
    if kind == "zoo" or not colon:
        entry = find(name if colon else reference)
        return Source(f"zoo:{entry.name}", spec or entry.spec, entry.training)
    if spec is None:
        raise UsageInvalid(
            f"what {reference} takes is not known: give --input-size HEIGHTxWIDTHxCHANNELS, "
            "--mean and --std"
        )
    return Source(reference, spec, TrainDefaults())


def _onnx_source(path: Path, spec: InputSpec | None) -> Source:
    if not path.is_file():
        raise ModelUnknown(f"there is no ONNX file {path}")
    if spec is None:
        raise UsageInvalid(
            f"what {path} was trained on is not known: give --input-size HEIGHTxWIDTHxCHANNELS, "
            "--mean and --std"
        )
    return Source(f"onnx:{path.name}", spec, TrainDefaults(), path)


def load_model(
    reference: str | Source,
    weights: Path | str | None = None,
    *,
    classes: int | None = None,
    spec: InputSpec | None = None,
    auxiliary: bool = False,
) -> LoadedModel:
    """Build a model and load its weights, all of them or none.

    Args:
        reference: As for :func:`resolve`.
        weights: A state dict (`.pt`, `.pth`, read without running any code in
            it) or `.safetensors`; fresh weights when None.
        classes: Number of classes; the zoo's own when None.
        spec: As for :func:`resolve`.
        auxiliary: Whether classifiers stay that only training needs, as Inception v3 has one.

    Raises:
        ModelUnknown: there is no such model.
        WeightsInvalid: the file is unreadable, or keys are missing, extra or
            misshaped; all of them are listed.
        LabelsMismatch: the model's head has another number of classes.
    """
    source = reference if isinstance(reference, Source) else resolve(reference, spec)
    kind, _, name = source.reference.partition(":")
    if classes is None:
        classes = find(name).classes if kind == "zoo" else 0
    module = source.build(classes)
    digest = ""
    if source.file is not None:
        if weights:
            raise UsageInvalid(f"{source.file} holds its own weights; leave --weights out")
        digest, weights = sha256_file(source.file), None
    if weights is not None:
        path = Path(weights)
        state = read_state(path)
        if not any(key.startswith("AuxLogits.") for key in state):
            _drop_auxiliary(module)
        load_state(module, state, path)
        digest = sha256_file(path)
    if not auxiliary:
        _drop_auxiliary(module)
    module.eval()
    found = _count_classes(module, source)
    if classes and found != classes:
        one = found == 1
        raise LabelsMismatch(
            f"{source.reference} has {found} {'class' if one else 'classes'}, the data {classes}"
            + ("; it must give a score for each class, of two classes, too" if one else "")
        )
    return LoadedModel(module, source, found, digest)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file.

    A checkpoint that holds it under "state_dict", "model_state_dict" or "model" is
    unwrapped, and the prefix "module." of data-parallel training is taken off.

    Raises:
        WeightsInvalid: the file is not there or not a state dict.
    """
    if not path.is_file():
        raise WeightsInvalid(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsInvalid(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch.load raises whatever unpickling raises
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsInvalid(
            f"{path} is not a plain state dict of tensors (whole pickled models are refused, "
            f"because reading them runs code): {first}"
        ) from error
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise WeightsInvalid(f"{path} is not a state dict: a mapping from names to tensors")
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Copy ``state`` into ``module``, all of it or nothing.

    Raises:
        WeightsInvalid: keys are missing, extra or misshaped; all are listed.
    """
    own = module.state_dict()
    # A counter that inference never reads; old checkpoints lack it.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    misshaped = [
        f"{key} ({list(state[key].shape)} in the file, {list(own[key].shape)} in the model)"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{title}: {_listed(keys)}"
        for title, keys in (("missing", missing), ("extra", extra), ("of another shape", misshaped))
        if keys
    ]
    if problems:
        raise WeightsInvalid(
            f"{path} does not fit the model; nothing was loaded; " + "; ".join(problems)
        )
    not_finite = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if not_finite:
        raise WeightsInvalid(f"{path} holds values that are not finite: {_listed(not_finite)}")
    module.load_state_dict(dict(state), strict=False)


def save_state(module: nn.Module, path: Path) -> None:
    """Write the module's weights as `.safetensors`, whole or not at all."""
    from pollard.runtime.bundle import write_durably

    # Copies, because modules that are shared appear under several names.
    state = {key: value.detach().clone().contiguous() for key, value in module.state_dict().items()}
    write_durably(path, safetensors.torch.save(state))


def _drop_auxiliary(module: nn.Module) -> None:
    if isinstance(module, InceptionV3):
        module.drop_auxiliary()


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(keys[:_LISTED_KEYS]) + more


def _count_classes(module: nn.Module, source: Source) -> int:
    task, outputs = task_of(source.task), _run(module, source)
    try:
        return task.check(outputs, 2)
    except ModelUnknown as error:
        raise ModelUnknown(f"{source.reference} {error}") from None


def _run(module: nn.Module, source: Source) -> object:
    spec = source.spec
    try:
        with placed(module.eval()) as device, torch.inference_mode():
            return module(torch.zeros(2, spec.channels, spec.height, spec.width).to(device))
    except Exception as error:
        told = (
            f"{source.reference} does not take [batch, {spec.channels}, {spec.height}, "
            f"{spec.width}]: "
        )
        if source.file is None:
            raise ModelUnknown(f"{told}{error}") from error
        raise ModelUnknown(
            f"{told}{first_line(error)}. Two images were given: if the file is for one only, "
            "export it with a batch that is free (dynamic_shapes or dynamic_axes of "
            "torch.onnx.export)"
        ) from error
