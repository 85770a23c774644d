"""Model configurations: read, completed from the graph, and made for models that have none."""

from __future__ import annotations

import re
from collections.abc import Sequence

from google.protobuf import json_format, text_format

from pollard.inference import model_config_pb2 as config_pb
from pollard.runtime.sessions import TensorInfo
from pollard.services.inference.errors import LoadRefused, PollFailed
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.scheduling import QueuePolicy, Scheduling

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
MODEL_FILE = "model.onnx"

_THREADS = "intra_op_thread_count"
"""Parameter of a configuration, as of Triton's ONNX Runtime backend."""

_NOT_OFFERED = (
    ("sequence_batching", "sequences of requests"),
    ("ensemble_scheduling", "ensembles"),
    ("model_operations", "libraries of custom operators"),
    ("batch_input", "inputs computed from the batch"),
    ("batch_output", "outputs split in a way of their own"),
)
"""Parts of a configuration that would change the answers and that this server cannot carry out."""


def parse_config(text: str, model: str) -> config_pb.ModelConfig:
    """Read a config.pbtxt.

    Raises:
        PollFailed: it is not one, or is another model's.
    """
    config = config_pb.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise poll_failed(model, f"failed to read text proto from config.pbtxt: {error}") from None
    return _named(config, model)


def parse_json_config(text: str, model: str) -> config_pb.ModelConfig:
    """Read a configuration as JSON, as a load request brings it.

    Raises:
        PollFailed: it is not one, or is another model's.
    """
    config = config_pb.ModelConfig()
    try:
        json_format.Parse(text, config)
    except json_format.ParseError as error:
        raise poll_failed(model, f"failed to parse 'config' override: {error}") from None
    return _named(config, model)


def says_batch_size(text: str) -> bool:
    """Tell whether a configuration sets max_batch_size itself: 0 and nothing look alike later."""
    return re.search(r'^[^#\n]*?\b(max_batch_size|maxBatchSize)"?\s*:', text, re.M) is not None


def _named(config: config_pb.ModelConfig, model: str) -> config_pb.ModelConfig:
    if config.name and config.name != model:
        raise poll_failed(
            model, f"unexpected directory name '{model}' for model '{config.name}' in its config"
        )
    config.name = model
    return config


def poll_failed(model: str, reason: str) -> PollFailed:
    """Return the error of a model that is not in the repository or cannot be read."""
    return PollFailed(
        f"failed to load '{model}', failed to poll from model repository: {reason}", model=model
    )


def check_config(config: config_pb.ModelConfig) -> None:
    """Check that this server can do what a configuration asks for.

    Raises:
        LoadRefused: it cannot, or the configuration contradicts itself.
    """
    if (config.platform or PLATFORM) != PLATFORM or (config.backend or BACKEND) != BACKEND:
        raise LoadRefused(
            f"model '{config.name}' wants the backend '{config.backend or config.platform}'; this "
            f"server runs ONNX models (backend '{BACKEND}')",
            model=config.name,
        )
    set_fields = {field.name for field, _ in config.ListFields()}
    for name, words in _NOT_OFFERED:
        if name in set_fields:
            raise LoadRefused(
                f"model '{config.name}' is configured with {name}, and {words} are not offered",
                model=config.name,
            )
    if config.model_transaction_policy.decoupled:
        raise LoadRefused(
            f"model '{config.name}' is configured as decoupled; ONNX models give one answer to a "
            "request",
            model=config.name,
        )
    if config.max_batch_size < 0:
        raise LoadRefused(
            f"'max_batch_size' must be non-negative value for {config.name}", model=config.name
        )
    tensors: list[config_pb.ModelInput | config_pb.ModelOutput] = [*config.input, *config.output]
    for tensor in tensors:
        if tensor.HasField("reshape"):
            raise LoadRefused(
                f"tensor '{tensor.name}' of model '{config.name}' is configured with reshape, "
                "which is not offered; reshape it in the graph",
                model=config.name,
            )
        if any(size < -1 or size == 0 for size in tensor.dims):
            raise LoadRefused(
                f"tensor '{tensor.name}' of model '{config.name}' must specify dims >= 1, or -1 "
                "for any size",
                model=config.name,
            )
    for group in config.instance_group:
        if group.count < 0:
            raise LoadRefused(
                f"instance group of model '{config.name}' must have a count >= 0",
                model=config.name,
            )
    levels = config.dynamic_batching.priority_levels
    if config.dynamic_batching.default_priority_level > levels:
        raise LoadRefused(
            f"default priority level must be within 1 and {levels} for {config.name}",
            model=config.name,
        )
    for size in config.dynamic_batching.preferred_batch_size:
        if not 0 < size <= max(1, config.max_batch_size):
            raise LoadRefused(
                f"dynamic batching preferred size must be positive and <= {config.max_batch_size} "
                f"for {config.name}",
                model=config.name,
            )


def complete(
    config: config_pb.ModelConfig,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    *,
    batch_size_given: bool,
    default_batch_size: int,
) -> config_pb.ModelConfig:
    """Return a configuration with what it leaves out filled in from the graph.

    Args:
        config: As written; it has passed `check_config`.
        inputs: Of the graph.
        outputs: Of the graph.
        batch_size_given: Whether its `max_batch_size` counts, also if it is 0.
        default_batch_size: Largest batch where the configuration names none and the graph can
            batch; 0 for none.

    Raises:
        LoadRefused: the configuration does not fit the graph.
    """
    full = config_pb.ModelConfig()
    full.CopyFrom(config)
    full.platform, full.backend = PLATFORM, BACKEND
    full.default_model_filename = config.default_model_filename or MODEL_FILE
    can_batch = all(info.shape[:1] == (-1,) for info in (*inputs, *outputs))
    if not config.max_batch_size and not batch_size_given and can_batch:
        ranks = {info.name: len(info.shape) for info in inputs}
        # Dimensions that are all of the graph's already count the first, so there is no batch.
        whole = any(len(tensor.dims) == ranks.get(tensor.name) for tensor in config.input)
        full.max_batch_size = 0 if whole else default_batch_size
        if full.max_batch_size > 1 and not full.HasField("dynamic_batching"):
            full.dynamic_batching.SetInParent()
    if full.max_batch_size and not can_batch:
        fixed = next(i for i in (*inputs, *outputs) if i.shape[:1] != (-1,))
        raise LoadRefused(
            f"model '{config.name}' is configured with max_batch_size {full.max_batch_size}, but "
            f"the first dimension of tensor '{fixed.name}' is not free in the graph; set "
            "max_batch_size to 0",
            model=config.name,
        )
    skip = 1 if full.max_batch_size else 0
    _complete_side(full, full.input, inputs, skip, "input", required=True)
    _complete_side(full, full.output, outputs, skip, "output", required=False)
    if not full.HasField("version_policy"):
        full.version_policy.latest.num_versions = 1
    return full


def _complete_side(
    config: config_pb.ModelConfig,
    given: Sequence[config_pb.ModelInput] | Sequence[config_pb.ModelOutput],
    graph: Sequence[TensorInfo],
    skip: int,
    side: str,
    *,
    required: bool,
) -> None:
    tensors = config.input if required else config.output
    by_name = {info.name: info for info in graph}
    for tensor in given:
        info = by_name.get(tensor.name)
        if info is None:
            raise LoadRefused(
                f"unexpected inference {side} '{tensor.name}', allowed {side}s are: "
                f"{', '.join(by_name)}",
                model=config.name,
            )
        datatype = _to_config(info.datatype)
        if tensor.data_type not in (config_pb.TYPE_INVALID, datatype):
            raise LoadRefused(
                f"model '{config.name}' configures {side} '{tensor.name}' as "
                f"{config_pb.DataType.Name(tensor.data_type)}, the graph has "
                f"{config_pb.DataType.Name(datatype)}",
                model=config.name,
            )
        tensor.data_type = datatype
        dims = info.shape[skip:]
        if not tensor.dims:
            tensor.dims.extend(dims)
        elif len(tensor.dims) != len(dims) or any(
            have not in (-1, want) for have, want in zip(dims, tensor.dims, strict=True)
        ):
            raise LoadRefused(
                f"model '{config.name}', tensor '{tensor.name}': the model expects {len(dims)} "
                f"dimensions (shape [{','.join(map(str, dims))}]) but the model configuration "
                f"specifies {len(tensor.dims)} dimensions (shape "
                f"[{','.join(map(str, tensor.dims))}])",
                model=config.name,
            )
    names = {tensor.name for tensor in given}
    if len(names) != len(given):
        raise LoadRefused(f"model '{config.name}' configures an {side} twice", model=config.name)
    if given and required and len(names) != len(by_name):
        missing = [name for name in by_name if name not in names]
        raise LoadRefused(
            f"model '{config.name}' has inputs that its configuration leaves out: "
            f"{', '.join(missing)}",
            model=config.name,
        )
    if not given:
        for info in graph:
            tensors.add(name=info.name, data_type=_to_config(info.datatype), dims=info.shape[skip:])


def tensors_of(
    config: config_pb.ModelConfig, graph: Sequence[TensorInfo], *, inputs: bool
) -> tuple[TensorInfo, ...]:
    """Return the tensors of a complete configuration, in the order of the graph."""
    side = config.input if inputs else config.output
    batch = (-1,) if config.max_batch_size else ()
    shapes = {tensor.name: (*batch, *tensor.dims) for tensor in side}
    return tuple(
        TensorInfo(info.name, info.datatype, shapes[info.name])
        for info in graph
        if info.name in shapes
    )


def scheduling_of(config: config_pb.ModelConfig, max_queue: int) -> Scheduling | None:
    """Return how a configuration wants requests to wait; None if it says nothing about it.

    Args:
        config: The configuration.
        max_queue: Most requests that wait, where the configuration sets no limit.
    """
    if not config.HasField("dynamic_batching"):
        return None
    batching = config.dynamic_batching

    def policy(message: config_pb.ModelQueuePolicy) -> QueuePolicy:
        return QueuePolicy(
            max_size=message.max_queue_size or max_queue,
            timeout_seconds=message.default_timeout_microseconds / 1e6,
            allow_override=message.allow_timeout_override,
            delay=message.timeout_action == config_pb.ModelQueuePolicy.DELAY,
        )

    default = QueuePolicy(max_size=max_queue)
    if batching.HasField("default_queue_policy"):
        default = policy(batching.default_queue_policy)
    return Scheduling(
        policy=default,
        levels=batching.priority_levels,
        default_level=batching.default_priority_level,
        level_policies=tuple(
            (level, policy(message))
            for level, message in sorted(batching.priority_queue_policy.items())
        ),
        exact=batching.default_queue_policy.max_queue_size > 0,
        delay_seconds=batching.max_queue_delay_microseconds / 1e6,
    )


def joined_batch_of(config: config_pb.ModelConfig) -> int:
    """Return the largest batch to make of waiting requests."""
    if not config.HasField("dynamic_batching"):
        return 1
    return max(config.dynamic_batching.preferred_batch_size, default=config.max_batch_size)


def threads_of(config: config_pb.ModelConfig) -> int:
    """Return the threads of one run that a configuration asks for; 0 if it does not.

    Raises:
        LoadRefused: it is no number of threads.
    """
    if _THREADS not in config.parameters:
        return 0
    text = config.parameters[_THREADS].string_value
    if not (text.isascii() and text.isdigit() and len(text) < 5):
        raise LoadRefused(
            f"parameter '{_THREADS}' of model '{config.name}' must be a number of threads, and is "
            f"'{text}'; 0 leaves it to the server",
            model=config.name,
        )
    return int(text)


def config_of(revision: LoadedRevision) -> config_pb.ModelConfig:
    """Return the configuration that a revision runs with; one is made for those without."""
    info = revision.info
    config = config_pb.ModelConfig()
    if info.config is not None:
        config.CopyFrom(info.config)
    else:
        config.name, config.platform, config.backend = info.model, PLATFORM, BACKEND
        config.default_model_filename = MODEL_FILE
        config.version_policy.specific.versions.append(info.revision)
        skip = 0
        if info.batches:
            config.max_batch_size = info.max_batch_size
            skip = 1
        for side, tensors in ((config.input, info.inputs), (config.output, info.outputs)):
            for tensor in tensors:
                side.add(
                    name=tensor.name,
                    data_type=_to_config(tensor.datatype),
                    dims=tensor.shape[skip:],
                )
        if revision.joined_batch > 1:
            config.dynamic_batching.preferred_batch_size.append(revision.joined_batch)
    if not config.instance_group:
        config.instance_group.add(
            name=f"{info.model}_0",
            kind=config_pb.ModelInstanceGroup.KIND_CPU
            if info.target.startswith("cpu")
            else config_pb.ModelInstanceGroup.KIND_GPU,
            count=revision.workers,
        )
    return config


def _to_config(datatype: str) -> config_pb.DataType.ValueType:
    return config_pb.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")
