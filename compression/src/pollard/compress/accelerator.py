"""Which device PyTorch computes on while networks are trained and tried: a GPU, or the processor.

Networks live in the processor's memory, where they are traced, cut and exported. Only what
computes much – training, answers for many images, batch norms measured anew, sensitivities –
takes them to the device that is in use, and brings them back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pollard.compress.errors import DeviceFailed, DeviceUnusable, first_line
from pollard.compress.progress import Reporter

CPU = torch.device("cpu")

_NAMES = "auto, cpu, cuda, or cuda:N for the GPU of that number"

# What PyTorch says where the GPU's own libraries fail, which is no kind of error of its own.
_LIBRARIES = re.compile(r"\b(cuDNN|CUDA) error|\bCU[A-Z]+_STATUS_|unable to find an engine")

_used: ContextVar[torch.device] = ContextVar("device", default=CPU)


def find(name: str = "auto") -> torch.device:
    """Return the device of a name, which is sure to compute.

    Args:
        name: "auto" is the GPU where PyTorch can use one, and the processor otherwise; "cpu";
            "cuda" is the first GPU, or under torchrun that of the process's local rank; "cuda:1"
            is the second. Other accelerators that PyTorch knows go by their own names.

    Raises:
        DeviceUnusable: there is no such device, or it does not compute; the message says why.
    """
    kind, colon, number = name.partition(":")
    if name == "cpu":
        return CPU
    known = kind in ("auto", "cuda") or (kind and kind == _accelerator())
    if not known or (colon and (kind == "auto" or not number.isdecimal())):
        raise DeviceUnusable(f"{name!r} is no device; there are {_NAMES}")
    if name == "auto":
        kind = _accelerator()
        # Others are used where they are named: not all of them know all that training needs.
        if kind != "cuda":
            return CPU
    elif kind != _accelerator():
        raise DeviceUnusable(f"PyTorch {torch.__version__} finds no GPU here: {_why_none()}")
    device = torch.device(kind, int(number) if colon else _local_rank())
    count = torch.accelerator.device_count()
    if device.index >= count:
        raise DeviceUnusable(_too_few(device.index, count, ranked=not colon))
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        raise DeviceUnusable(
            f"{describe(device)} does not compute: {first_line(error)}; --device cpu does "
            "without it"
        ) from error
    return device


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    return "" if found is None else found.type


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "it is built for processors alone. Install a build for CUDA (pytorch.org has the "
            "command), or give --device cpu"
        )
    return (
        "there is no NVIDIA driver that it can use, or CUDA_VISIBLE_DEVICES hides the GPUs; "
        "nvidia-smi shows what there is. Or give --device cpu"
    )


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _too_few(index: int, count: int, *, ranked: bool) -> str:
    if ranked and _local_rank():
        return (
            f"there is no GPU for process {index} of this machine; it has {count}. Start as many "
            "processes as there are GPUs (--nproc-per-node), or give --device cpu"
        )
    return f"there is no GPU {index}; PyTorch finds {count}, which are numbered from 0"


def describe(device: torch.device) -> str:
    """Return a device's name for people, such as "NVIDIA H200 (cuda:0)"."""
    if device.type == "cuda":
        with suppress(RuntimeError):
            return f"{torch.cuda.get_device_name(device)} ({device})"
    return "the processor" if device == CPU else str(device)


def tell(device: torch.device, reporter: Reporter) -> None:
    """Say what is computed on, where that is not the processor."""
    if device != CPU:
        reporter.say(f"PyTorch computes on {describe(device)}")


def used() -> torch.device:
    """Return the device that is in use here; the processor where none has been chosen."""
    return _used.get()


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Use a device for a while.

    Raises:
        DeviceFailed: its memory was too small, or it failed.
    """
    token = _used.set(device)
    try:
        with ExitStack() as stack:
            if device.type == "cuda":
                before = torch.cuda.current_device()
                torch.cuda.set_device(device)
                stack.callback(torch.cuda.set_device, before)
                # Batches have one size: the search for the fastest convolution pays.
                stack.callback(
                    setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark
                )
                torch.backends.cudnn.benchmark = True
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceFailed(
            f"{describe(device)} has not enough memory: {first_line(error)}. Give a smaller "
            "--batch-size, end what else holds its memory, or give --device cpu"
        ) from error
    except RuntimeError as error:
        told = first_line(error)
        if not isinstance(error, torch.AcceleratorError) and not _LIBRARIES.search(told):
            raise
        raise DeviceFailed(
            f"{describe(device)} failed: {told}. Give --device cpu to do without it"
        ) from error
    finally:
        _used.reset(token)
        free(device)


@contextmanager
def placed(*modules: nn.Module) -> Iterator[torch.device]:
    """Take modules to the device that is in use, and bring them back in the end.

    Parameters may be other objects meanwhile and afterwards: whoever keeps them, as an optimizer
    does, takes them from the module while it is placed.

    Yields:
        The device.
    """
    device = used()
    homes = [(module, home) for module in modules if (home := home_of(module)) != device]
    try:
        for module, _ in homes:
            module.to(device)
        yield device
    finally:
        for module, home in homes:
            # A device that is lost keeps what it holds; why it is lost is told already.
            with suppress(torch.AcceleratorError):
                module.to(home)


def home_of(module: nn.Module) -> torch.device:
    """Return where a module's weights are; the processor's memory if it has none."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return CPU if first is None else first.device


def moved(value: Any, device: torch.device) -> Any:
    """Return a value with all tensors in its tuples, lists and mappings on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        parts = [moved(each, device) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        return {key: moved(each, device) for key, each in value.items()}
    return value


def device_chance(device: torch.device) -> Tensor | None:
    """Return the state of a device's own generator, which dropout draws from; None of the
    processor, whose generator is PyTorch's."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_device_chance(device: torch.device, state: Tensor | None) -> None:
    """Set what :func:`device_chance` gave, if it was of such a device."""
    if device.type == "cuda" and state is not None:
        torch.cuda.set_rng_state(state, device)


@contextmanager
def in_full(device: torch.device) -> Iterator[None]:
    """Compute answers in whole float32, whatever GPUs may round factors to else, and without a
    search for the fastest convolution, which does not pay for a few batches of several sizes."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn  # takes the place of its own module
    operations = cudnn.conv, torch.backends.cuda.matmul
    before = [operation.fp32_precision for operation in operations]
    searches, cudnn.benchmark = cudnn.benchmark, False
    for operation in operations:
        operation.fp32_precision = "ieee"
    try:
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision
        cudnn.benchmark = searches


def free(device: torch.device) -> None:
    """Give the device's memory that PyTorch keeps for later back, for others such as
    ONNX Runtime."""
    if device.type == "cuda":
        with suppress(torch.AcceleratorError):
            torch.cuda.empty_cache()
