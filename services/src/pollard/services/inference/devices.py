"""Loading onto a GPU: whether there is memory, how many instances, and every batch size warm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import structlog

from pollard.runtime import cuda
from pollard.runtime.cuda import CudaOptions
from pollard.runtime.device_session import DeviceSession
from pollard.runtime.errors import DeviceFault, DeviceMemoryShort
from pollard.services.inference.description import ModelDescription, Outline
from pollard.services.inference.errors import LoadRefused, MemoryShort
from pollard.services.inference.options import EngineOptions, device_workers, given_by
from pollard.services.inference.tensors import batches, zeros

_log = structlog.get_logger("pollard.inference.devices")

_MEBIBYTE = 1 << 20

_WORKSPACE_BYTES = 128 * _MEBIBYTE
"""Of one instance beside its weights, at the least: activations and cuDNN's workspace."""


def cuda_options(options: EngineOptions, outline: Outline) -> CudaOptions:
    """Return how a version is opened on the GPU: one instance for each worker."""
    workers = device_workers(given_by(options, outline))
    return replace(options.cuda, instances=workers, devices=outline.devices)


def check_device_memory(options: EngineOptions, outline: Outline, copies: int = 1) -> None:
    """Check that the GPU has memory for a version beside what runs, before it is loaded.

    What activations take shows only in the runs that follow; if those find the memory too small,
    the load ends there, and what runs goes on in the memory that it has already.

    Args:
        options: Of the server.
        outline: Of the version.
        copies: Servers on this machine that will load it, this one included.

    Raises:
        MemoryShort: it has not, or the limit for one revision is smaller than the weights.
        DeviceFault: CUDA cannot tell.
        ProviderMissing: there is no CUDA.
    """
    file = outline.model_file
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    placed = cuda_options(options, outline).placed
    limit = options.cuda.memory_limit_bytes
    if limit and limit < size * len(placed):
        raise MemoryShort(
            f"its weights take {size // _MEBIBYTE} MiB of the GPU for each of {len(placed)} "
            f"instances, and --gpu-memory-limit allows {limit // _MEBIBYTE} MiB for a revision; "
            "raise it, or run fewer workers",
            needed_bytes=size * len(placed),
            available_bytes=limit,
        )
    one = max(outline.needed_bytes, size + _WORKSPACE_BYTES)
    for device_id, count in Counter(placed).items():
        cuda.require(device_id)
        needed = one * count * copies
        free, total = cuda.memory(device_id)
        available = max(0, free - options.device_headroom_bytes)
        if needed > available:
            raise MemoryShort(
                f"loading it beside what runs takes about {needed // _MEBIBYTE} MiB of GPU "
                f"{device_id}, and {available // _MEBIBYTE} of {total // _MEBIBYTE} MiB are "
                "available; unload a revision, end other processes on the GPU (nvidia-smi shows "
                "them), or run fewer workers",
                needed_bytes=needed,
                available_bytes=available,
                device=device_id,
            )


def warm_on_device(
    session: DeviceSession, description: ModelDescription, go_on: Callable[[], None]
) -> None:
    """Run every size of a batch on every instance, the largest first.

    Args:
        session: The open model.
        description: Of the version.
        go_on: Raises if the load is not wanted any more.

    Raises:
        MemoryShort: the GPU, or the limit for one revision, is too small.
        LoadRefused: the model fails on zeros or on its own warm-up.
        DeviceFault: the GPU failed.
    """
    inputs = description.inputs
    known = (*inputs, *description.outputs)
    sizes: tuple[int, ...] = (1,)
    if description.max_batch_size > 0 and all(batches(info) for info in known):
        sizes = session.batch_up_to(description.max_batch_size, known) or (
            1,
            description.max_batch_size,
        )
    first = 1 if description.max_batch_size else 0
    free = any(-1 in info.shape[first:] for info in inputs)
    for size in sorted(set(sizes), reverse=True):
        go_on()
        try:
            session.warm(lambda rows: {info.name: zeros(info, rows) for info in inputs}, (size,))
        except DeviceMemoryShort as error:
            raise _too_large(error, size) from error
        except DeviceFault:
            raise
        except Exception as error:
            if free:
                # Zeros with free dimensions of 1 need not be a valid input.
                _log.warning("cannot be warmed", batch=size, error=str(error))
                break
            raise LoadRefused(
                f"the model fails on a batch of {size} zeros: {_first_line(error)}", batch=size
            ) from error
    for warmup in description.warmups:
        go_on()
        try:
            session.run(warmup)
        except DeviceMemoryShort as error:
            raise _too_large(error, 0) from error
        except DeviceFault:
            raise
        except Exception as error:
            raise LoadRefused(f"the model fails on its warm-up: {_first_line(error)}") from error
    if any(each.gated and not each.graphs for each in session.instances):
        _log.warning("runs without CUDA graphs: some of its nodes run on the processor")
    for problem in {each.graph_problem for each in session.instances if each.graph_problem}:
        _log.warning("runs without a CUDA graph", error=problem)


def _too_large(error: DeviceMemoryShort, size: int) -> MemoryShort:
    batch = f"a batch of {size}" if size else "its warm-up"
    return MemoryShort(
        f"{batch} does not fit into the memory of the GPU beside what runs: {error.message}; allow "
        "more with --gpu-memory-limit if that is set, unload a revision, run fewer workers, or "
        "lower the largest batch",
        **error.metadata,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
