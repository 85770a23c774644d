"""A device of PyTorch's that every machine has: the processor computes for it.

Its tensors are of another device for PyTorch and for whoever asks. An operation that is given one
of them and one of the processor's fails, as on a GPU; so does NumPy. What runs here does not mix
devices up, and what comes out must be what the processor gives, but for the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretended"

# Operations that take tensors of both on a GPU, too.
_ACROSS = ("aten._to_copy.default", "aten.copy_.default")


class PretendedTensor(Tensor):
    """A tensor of the device, which keeps its numbers in one of the processor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendedTensor:
        made: PretendedTensor = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"pretended({self.held})"


def _run(operation: Any, args: Any, kwargs: Any) -> Any:
    name = str(operation)

    def inner(value: Any) -> Any:
        if isinstance(value, PretendedTensor):
            return value.held
        # A number that is a tensor goes along with those of any device.
        if isinstance(value, Tensor) and value.ndim and name not in _ACROSS:
            raise RuntimeError(f"{name}: a tensor of the processor beside one of the device")
        return value

    given, options = pytree.tree_map(inner, (args, kwargs))
    to = options.get("device")
    if to is not None:
        options["device"] = "cpu"
    made = operation(*given, **options)
    if to is not None and torch.device(to).type == "cpu":
        return made
    if name == "aten.copy_.default" and not isinstance(args[0], PretendedTensor):
        return args[0]
    # Operations in place give back the very tensor that they were given.
    same = {
        id(value.held): value
        for value in pytree.tree_leaves((args, kwargs))
        if isinstance(value, PretendedTensor)
    }

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else PretendedTensor(value)

    return pytree.tree_map(outer, made)


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> None:
    """Make the device known to PyTorch, until the process ends."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(
        lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1"
    )
    # In bfloat16, too, it computes in float32.
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _kept.append(library)


_kept: list[torch.library.Library] = []
