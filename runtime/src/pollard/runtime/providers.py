"""Opening models on onnxruntime's GPU providers, without its silent fallback to the processor."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pollard.runtime import cuda
from pollard.runtime.cuda import CudaOptions
from pollard.runtime.device_errors import explain, state_of
from pollard.runtime.device_graphs import keep_apart
from pollard.runtime.device_session import DeviceSession, Instance
from pollard.runtime.errors import DeviceFault, ProviderMissing
from pollard.runtime.machine import PROVIDERS
from pollard.runtime.sessions import load_failed
from pollard.runtime.staging import staging_for

_CUDA, _TENSORRT, _CPU = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "CPUExecutionProvider",
)

_UNKNOWN_OPTION = re.compile(r'Unknown provider option: "(\w+)"')
_NO_GRAPH = re.compile(r"graph capture|CUDA ?graph", re.IGNORECASE)

Providers = list[Any]


def open_on_device(
    model: Path | bytes, target: str, session_options: Any, options: CudaOptions
) -> DeviceSession:
    """Open a model on the GPU, once for each instance.

    Args:
        model: The file, or its bytes.
        target: Decides the provider; any but the processor's.
        session_options: `onnxruntime.SessionOptions`.
        options: How it is run.

    Raises:
        ProviderMissing: the provider cannot be used here; the message says what is missing.
        DeviceFault: the GPU is full, or failed.
        ModelLoadFailed: onnxruntime refuses the model.
    """
    provider = PROVIDERS[target]
    for device_id in set(options.placed):
        cuda.require(device_id, provider)
        state_of(device_id).check()
    gated = options.graphs
    if gated:
        keep_apart()
    if provider == _TENSORRT:
        options = replace(options, graphs=False)
    instances: list[Instance] = []
    try:
        for device_id in options.placed:
            raw, graphs = _open(model, provider, session_options, options, device_id)
            if not graphs:
                # What one instance cannot do, the next one cannot either.
                options = replace(options, graphs=False)
            instances.append(
                Instance(
                    raw, state_of(device_id), staging_for(device_id), graphs=graphs, gated=gated
                )
            )
    except BaseException:
        for instance in instances:
            instance.close()
        raise
    return DeviceSession(instances, target)


def _open(
    model: Path | bytes, provider: str, session_options: Any, options: CudaOptions, device_id: int
) -> tuple[Any, bool]:
    """Open one instance; tells also whether it may capture graphs."""
    state = state_of(device_id)
    given = options.provider_options(device_id)
    while True:
        try:
            raw = open_raw(model, session_options, _providers(provider, given, device_id))
            break
        except Exception as error:  # onnxruntime's exceptions share no base class but this
            explained = explain(error, state)
            if isinstance(explained, DeviceFault):
                raise _with_memory(explained, device_id) from error
            if isinstance(error, ProviderMissing):
                raise
            # An older or newer onnxruntime may not know an option; none of them changes answers.
            unknown = _UNKNOWN_OPTION.search(str(error))
            if unknown is not None and given.pop(unknown[1], None) is not None:
                continue
            if given.get("enable_cuda_graph") and _NO_GRAPH.search(str(error)):
                # Some of its nodes run on the processor.
                del given["enable_cuda_graph"]
                continue
            raise load_failed(error) from error
    return raw, "enable_cuda_graph" in given


def open_raw(model: Path | bytes, session_options: Any, providers: Providers) -> Any:
    """Return an `onnxruntime.InferenceSession` on the first of `providers`.

    Raises:
        ProviderMissing: onnxruntime fell back to another one.
    """
    import onnxruntime

    # It warns of a provider that is none of its plugins, at each session; errors still come.
    onnxruntime.set_default_logger_severity(3)
    source = model if isinstance(model, bytes) else str(model)
    # Its fallback would print the error, and go on with the processor.
    raw = onnxruntime.InferenceSession(
        source, session_options, providers=providers, enable_fallback=0
    )
    wanted = providers[0][0] if isinstance(providers[0], tuple) else providers[0]
    if raw.get_providers()[0] != wanted:
        raise ProviderMissing(
            f"onnxruntime fell back from {wanted} to {raw.get_providers()[0]}; `pollard doctor` "
            "says what is missing",
            provider=wanted,
        )
    return raw


def _providers(provider: str, given: dict[str, str], device_id: int) -> Providers:
    providers: Providers = [(_CUDA, dict(given)), _CPU]
    if provider == _TENSORRT:
        told = {
            "device_id": str(device_id),
            "trt_fp16_enable": "1",
            "trt_int8_enable": "1",
        }
        providers.insert(0, (_TENSORRT, told))
    return providers


def _with_memory(error: Exception, device_id: int) -> Exception:
    """Add how much memory is free, which tells a full GPU from a limit that is too small."""
    if not isinstance(error, DeviceFault):
        return error
    try:
        free, total = cuda.memory(device_id)
    except (DeviceFault, ProviderMissing):
        return error
    return type(error)(
        f"{error.message} ({free >> 20} of {total >> 20} MiB are free; what other processes hold "
        "is in nvidia-smi)",
        **{**error.metadata, "free_bytes": free},
    )
