"""A repository of models in Triton's layout, as it lies on disk.

::

    REPOSITORY/
        MODEL/
            config.pbtxt        optional; what it leaves out is completed from the graph
            labels.txt          or another name, if the configuration names one
            warmup/             data of the configuration's warm-up requests
            1/model.onnx        one folder a version
            2/model.onnx
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pollard.inference import model_config_pb2 as config_pb
from pollard.runtime import cuda
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import Array, Session, TensorInfo
from pollard.runtime.tensors import NUMPY
from pollard.services.inference.config import (
    MODEL_FILE,
    check_config,
    complete,
    joined_batch_of,
    parse_config,
    parse_json_config,
    poll_failed,
    says_batch_size,
    scheduling_of,
    tensors_of,
    threads_of,
)
from pollard.services.inference.description import ModelDescription, Outline
from pollard.services.inference.errors import LoadRefused, RequestInvalid
from pollard.services.inference.tensors import from_raw

CONFIG_FILE = "config.pbtxt"

_GPU_TARGETS = {
    "CUDAExecutionProvider": "cuda-fp16",
    "TensorrtExecutionProvider": "tensorrt-int8",
}
"""Target of a plain model by provider; CUDA comes first where there are both."""

Stamp = tuple[tuple[str, int, int, int], ...]
"""Path, size, time of change and inode of each file: what tells that something has changed."""


@dataclass(frozen=True)
class Limits:
    """What holds where a configuration says nothing."""

    default_batch_size: int = 4
    """Largest batch of a model that can batch and has no configuration."""
    max_queue: int = 1024
    """Most requests of a model that wait."""


@dataclass(frozen=True)
class RepositoryEntry:
    """One model as it lay on disk when it was read."""

    name: str
    folder: Path
    config: config_pb.ModelConfig
    batch_size_given: bool
    """Whether its configuration's max_batch_size counts, also if it is 0."""
    versions: tuple[int, ...]
    """That its version policy serves, ascending."""
    stamp: Stamp


class ModelRepository:
    """Reads the models of one folder. Safe to use from any thread."""

    def __init__(self, root: Path) -> None:
        """Read from `root`."""
        self.root = root

    def names(self) -> list[str]:
        """Return the names of the models, whether they can be loaded or not."""
        try:
            return sorted(
                entry.name
                for entry in self.root.iterdir()
                if entry.is_dir() and not entry.name.startswith(".")
            )
        except OSError:
            return []

    def stamp(self, name: str) -> Stamp:
        """Return what changes when a file of a model does; empty if there is no such model."""
        folder = self._folder(name)
        return stamp_of(folder) if folder is not None else ()

    def read(self, name: str, config: str | None = None) -> RepositoryEntry:
        """Read a model's configuration and find its versions.

        Args:
            name: Of the model.
            config: JSON that takes the place of its configuration file.

        Raises:
            PollFailed: there is no such model, or its configuration is unreadable.
            LoadRefused: the configuration cannot be carried out.
        """
        folder = self._folder(name)
        if folder is None:
            raise poll_failed(name, "there is no such model in the repository")
        return read_folder(name, folder, config)

    def _folder(self, name: str) -> Path | None:
        # The name comes from a request: it must not lead out of the repository.
        if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
            return None
        folder = self.root / name
        try:
            return folder if folder.is_dir() else None
        except OSError:
            # Longer than any name can be, or not to be looked at.
            return None


def stamp_of(folder: Path) -> Stamp:
    """Return what changes when a file below `folder` does."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            status = path.stat()
        except OSError:
            # It went away while we looked; the next look sees the rest.
            continue
        if path.is_file():
            relative = path.relative_to(folder).as_posix()
            found.append((relative, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def read_folder(name: str, folder: Path, config: str | None = None) -> RepositoryEntry:
    """Read the model in `folder`; see `ModelRepository.read`."""
    # Before anything is read: a change in between is then seen as one.
    stamp = stamp_of(folder)
    given = False
    if config is not None:
        parsed = parse_json_config(config, name)
        given = says_batch_size(config)
    elif (folder / CONFIG_FILE).is_file():
        try:
            text = (folder / CONFIG_FILE).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise poll_failed(name, f"{CONFIG_FILE} cannot be read: {error}") from error
        parsed = parse_config(text, name)
        given = says_batch_size(text)
    else:
        parsed = config_pb.ModelConfig(name=name)
    check_config(parsed)
    present = sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name.isascii() and entry.name.isdigit() and entry.name[0] != "0"
    )
    versions = _chosen(parsed.version_policy, present)
    if not versions:
        raise LoadRefused(
            f"at least one version must be available under the version policy of model '{name}'; "
            f"there are {present or 'none'}",
            model=name,
        )
    return RepositoryEntry(name, folder, parsed, given, versions, stamp)


def _chosen(policy: config_pb.ModelVersionPolicy, present: list[int]) -> tuple[int, ...]:
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return tuple(present)
    if kind == "specific":
        wanted = set(policy.specific.versions)
        return tuple(version for version in present if version in wanted)
    return tuple(present[-max(1, policy.latest.num_versions) :])


class RepositoryModel:
    """One version of a model in a repository, as a source for the loader."""

    def __init__(self, entry: RepositoryEntry, version: int, limits: Limits) -> None:
        """Take version `version` of `entry`."""
        self._entry = entry
        self._version = version
        self._limits = limits

    def outline(self, machine: Machine) -> Outline:
        """Find the file and where it runs."""
        entry, config = self._entry, self._entry.config
        file = _inside(
            entry.folder / str(self._version), config.default_model_filename or MODEL_FILE, entry
        )
        if not file.is_file():
            raise LoadRefused(
                f"unable to find '{file.relative_to(entry.folder)}' for model '{entry.name}'",
                model=entry.name,
            )
        groups = [group for group in config.instance_group if not group.passive]
        target, devices = _placed(entry.name, groups, machine)
        return Outline(
            model=entry.name,
            version=self._version,
            model_file=file,
            target=target,
            size_bytes=sum(size for path, size, *_ in entry.stamp if self._owns(path)),
            workers=len(devices) or sum(max(1, group.count) for group in groups),
            threads=threads_of(config),
            devices=devices,
        )

    def verify(self) -> None:
        """Nothing: a repository has no digests."""

    def describe(self, session: Session) -> ModelDescription:
        """Describe it by its configuration, completed from the graph."""
        entry = self._entry
        config = complete(
            entry.config,
            session.inputs,
            session.outputs,
            batch_size_given=entry.batch_size_given,
            default_batch_size=self._limits.default_batch_size,
        )
        inputs = tensors_of(config, session.inputs, inputs=True)
        return ModelDescription(
            inputs=inputs,
            outputs=tensors_of(config, session.outputs, inputs=False),
            max_batch_size=config.max_batch_size,
            joined_batch=joined_batch_of(config),
            # What is only filled in says what may be joined, not that it pays. A configuration of a
            # model that batches, and that does not ask for joining, has decided against it.
            joining_settled=entry.config.HasField("dynamic_batching")
            or (config.max_batch_size > 1 and not config.HasField("dynamic_batching")),
            scheduling=scheduling_of(config, self._limits.max_queue),
            labels=self._labels(config),
            config=config,
            warmups=self._warmups(config, inputs),
        )

    def check(self, session: Session) -> None:
        """Nothing: a repository has no golden outputs."""

    def _owns(self, path: str) -> bool:
        return path.startswith(f"{self._version}/")

    def _labels(self, config: config_pb.ModelConfig) -> dict[str, tuple[str, ...]]:
        labels = {}
        for output in config.output:
            if output.label_filename:
                file = _inside(self._entry.folder, output.label_filename, self._entry)
                labels[output.name] = tuple(_read(file, self._entry).decode().splitlines())
        return labels

    def _warmups(
        self, config: config_pb.ModelConfig, inputs: tuple[TensorInfo, ...]
    ) -> tuple[Mapping[str, Array], ...]:
        feeds: list[Mapping[str, Array]] = []
        specs = {info.name: info for info in inputs}
        for warmup in config.model_warmup:
            if set(warmup.inputs) != set(specs):
                raise LoadRefused(
                    f"warm-up '{warmup.name}' of model '{config.name}' must give the inputs "
                    f"{sorted(specs)}, and gives {sorted(warmup.inputs)}",
                    model=config.name,
                )
            batch = (warmup.batch_size,) if config.max_batch_size else ()
            if config.max_batch_size and not 0 < warmup.batch_size <= config.max_batch_size:
                raise LoadRefused(
                    f"warm-up '{warmup.name}' of model '{config.name}' must have a batch_size from "
                    f"1 to {config.max_batch_size}",
                    model=config.name,
                )
            arrays = {
                name: self._warmup_input(specs[name], given, (*batch, *given.dims))
                for name, given in warmup.inputs.items()
            }
            feeds += [arrays] * max(1, warmup.count)
        return tuple(feeds)

    def _warmup_input(
        self, spec: TensorInfo, given: config_pb.ModelWarmup.Input, shape: tuple[int, ...]
    ) -> Array:
        fits = len(shape) == len(spec.shape) and all(
            size > 0 and wanted in (-1, size)
            for size, wanted in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise LoadRefused(
                f"a warm-up gives input '{spec.name}' of model '{self._entry.name}' the shape "
                f"{list(shape)}, and the model takes {list(spec.shape)}",
                model=self._entry.name,
            )
        if given.input_data_file:
            file = _inside(self._entry.folder / "warmup", given.input_data_file, self._entry)
            data = _read(file, self._entry)
            try:
                return from_raw(data, spec.datatype, shape, spec.name, self._entry.name)
            except RequestInvalid as error:
                raise LoadRefused(
                    f"warm-up data {given.input_data_file}: {error.message}",
                    model=self._entry.name,
                ) from error
        if spec.datatype == "BYTES":
            return np.full(shape, "", dtype=np.object_)
        kind = NUMPY[spec.datatype]
        if not given.random_data:
            return np.zeros(shape, kind)
        generator = np.random.default_rng(0)
        if kind.kind == "f":
            return generator.standard_normal(shape).astype(kind)
        if spec.datatype == "BF16":
            # Bits of numbers between 1 and 2; any bits would be NaN now and then.
            return generator.integers(0x3F80, 0x4000, shape).astype(kind)
        data = generator.bytes(math.prod(shape) * kind.itemsize)
        return from_raw(data, spec.datatype, shape, spec.name, self._entry.name)


def _placed(
    model: str, groups: Sequence[config_pb.ModelInstanceGroup], machine: Machine
) -> tuple[str, tuple[int, ...]]:
    """Return where the instance groups of a model put it: the target, and the GPU of each worker.

    Raises:
        LoadRefused: there is no such GPU, or none at all, or the server may not use the processor.
    """
    kinds = {group.kind for group in groups}
    kind = config_pb.ModelInstanceGroup
    gpu = next((name for name in _GPU_TARGETS if name in machine.execution_providers), "")
    if kind.KIND_GPU in kinds and not gpu:
        raise LoadRefused(
            f"instance group of model '{model}' is of kind KIND_GPU but no GPUs are available; "
            "leave kind out, or set KIND_CPU",
            model=model,
        )
    if not gpu or (kind.KIND_CPU in kinds and kind.KIND_GPU not in kinds):
        if "CPUExecutionProvider" not in machine.execution_providers:
            raise LoadRefused(
                f"instance group of model '{model}' is of kind KIND_CPU, and this server runs "
                "models on the GPU only; start it with --provider auto",
                model=model,
            )
        return "cpu-fp32", ()
    placed: list[int] = []
    for group in groups:
        if group.kind != kind.KIND_CPU:
            placed += [device for device in group.gpus for _ in range(max(1, group.count))]
    if placed:
        there = [device.index for device in cuda.devices()]
        for device in placed:
            if device not in there:
                raise LoadRefused(
                    f"instance group of model '{model}' specifies invalid or unsupported gpu id "
                    f"{device}. GPUs available: {', '.join(map(str, there)) or 'none'}",
                    model=model,
                    device=device,
                )
    return _GPU_TARGETS[gpu], tuple(placed)


def _inside(folder: Path, name: str, entry: RepositoryEntry) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise LoadRefused(
            f"'{name}' in the configuration of model '{entry.name}' leads out of its folder",
            model=entry.name,
        )
    return path


def _read(file: Path, entry: RepositoryEntry) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise LoadRefused(
            f"'{file.name}' of model '{entry.name}' cannot be read: {error.strerror}",
            model=entry.name,
        ) from error
