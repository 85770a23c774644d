"""Dense layers as two narrow ones: a low-rank product in place of one wide matrix.

The product is what a singular value decomposition leaves of the weights when only the
largest singular values are kept. What is kept is told as energy: the share of the sum of
the squared singular values, which is the share of the squared weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pollard.compress.kernels import kernel_of
from pollard.compress.latency import LatencyTable
from pollard.compress.operations import Operation, list_operations
from pollard.compress.spec import InputSpec

# Ranks are multiples of this, as kernels like their channels.
_MULTIPLE = 16

# Ranks offered to a budget, as shares of the largest rank that saves weights.
_SHARES = (0.85, 0.7, 0.55, 0.42, 0.32, 0.24, 0.17, 0.12, 0.08, 0.05, 0.03)

# Matrices up to this many rows are decomposed in float64; it costs little there.
_EXACT_UP_TO = 1024


class FactorizedLinear(nn.Module):
    """A dense layer of limited rank: ``expand(reduce(x))``."""

    def __init__(self, in_features: int, rank: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    @property
    def rank(self) -> int:
        """Width between the two."""
        return int(self.reduce.weight.shape[0])

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the layer as a whole."""
        return self.expand.bias

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.expand(self.reduce(x))
        return outputs


@dataclass(frozen=True)
class DensePlan:
    """What became of one dense layer."""

    name: str
    in_features: int
    """As it was when this was decided."""
    out_features: int
    rank: int
    """0 where it stayed whole."""
    energy: float
    """Share of the squared weights that is left, before any training."""
    why: str
    """Why it was factorised, or why not."""


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer that can be factorised, decomposed."""

    name: str
    in_features: int
    out_features: int
    energies: Tensor = field(repr=False)
    """Rank - 1 → share of the energy that this rank keeps, ascending to 1."""
    basis: Tensor = field(repr=False)
    """Singular vectors in columns, the largest first: of the outputs, or of the inputs where
    these are fewer."""

    @property
    def limit(self) -> int:
        """Return the largest rank whose two matrices have fewer weights than the one."""
        return (self.in_features * self.out_features - 1) // (self.in_features + self.out_features)

    def energy(self, rank: int) -> float:
        """Return the share of the energy that a rank keeps."""
        return float(self.energies[rank - 1])

    def rank_for(self, energy: float) -> int:
        """Return the least rank, a multiple of what kernels like, that keeps so much energy."""
        least = int(torch.searchsorted(self.energies, torch.tensor(energy - 1e-9))) + 1
        return -(-least // _MULTIPLE) * _MULTIPLE

    def ranks(self, least_energy: float = 0.0) -> list[int]:
        """Return the ranks offered to a budget, the largest first; all of them save weights."""
        found = {round(self.limit * share / _MULTIPLE) * _MULTIPLE for share in _SHARES}
        return sorted(
            (r for r in found if 0 < r <= self.limit and self.energy(r) >= least_energy),
            reverse=True,
        )

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the weights of both layers.

        The rows of the first have unit length, so that what lies between the two is of one
        size in all channels, as 8 bits want it.
        """
        kept = self.basis[:, :rank].to(weight)
        if self.out_features > self.in_features:
            return kept.T.contiguous(), weight @ kept
        inner = kept.T @ weight
        lengths = inner.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
        return inner / lengths[:, None], kept * lengths

    def curve(self, ranks: Sequence[int], near: int, loss: float) -> dict[int, float]:
        """Return the loss at each rank, in proportion to the energy that goes.

        Args:
            ranks: From :meth:`ranks`.
            near: Of these, the one that was looked at.
            loss: What was found there.
        """
        gone = {rank: 1 - self.energy(rank) + 0.01 * (1 - rank / self.limit) for rank in ranks}
        return {rank: loss * gone[rank] / gone[near] for rank in ranks}


def decompose(name: str, weight: Tensor) -> DenseLayer:
    """Return a dense layer's singular vectors and what they keep.

    By way of the smaller of the two Gram matrices: a VGG's first dense layer has 4,096 ×
    25,088 weights, of which a full decomposition would need minutes and gigabytes.
    """
    matrix = weight.detach()
    if min(matrix.shape) <= _EXACT_UP_TO:
        matrix = matrix.double()
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    energies = values.flip(0).double().clamp_min(0).cumsum(0)
    total = float(energies[-1]) or 1.0
    return DenseLayer(
        name, columns, rows, energies / total, vectors.flip(1).to(weight.dtype).contiguous()
    )


def find_dense(
    module: nn.Module, takes: InputSpec | Tensor, keep_whole: Sequence[str] = ()
) -> tuple[list[DenseLayer], list[DensePlan]]:
    """Return the dense layers that can be factorised, and of the others why they cannot.

    Args:
        module: It is not changed.
        takes: What it takes, or an example.
        keep_whole: Layers that are named to stay as they are.
    """
    runs = Counter(o.name for o in list_operations(module, takes) if o.kind == "Gemm")
    homes: Counter[int] = Counter(
        id(layer.weight)
        for _, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear)
    )
    inner = {
        f"{name}.{part}"
        for name, layer in module.named_modules()
        if isinstance(layer, FactorizedLinear)
        for part in ("reduce", "expand")
    }
    layers: list[DenseLayer] = []
    whole: list[DensePlan] = []
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear) or name in inner or not name:
            continue
        outs, ins = layer.weight.shape
        limit = (ins * outs - 1) // (ins + outs)
        why = ""
        if name in keep_whole:
            why = "it was named to stay whole"
        elif type(layer) is not nn.Linear or homes[id(layer.weight)] > 1 or runs[name] != 1:
            why = "it does not run exactly once as a plain dense layer"
        elif limit < _MULTIPLE:
            why = f"it is small: a rank would have to be {max(0, limit)} or less to save weights"
        if why:
            whole.append(DensePlan(name, ins, outs, 0, 1.0, why))
        else:
            layers.append(decompose(name, layer.weight))
    return layers, whole


def put_factors(module: nn.Module, layer: DenseLayer, rank: int) -> None:
    """Put two narrow layers in place of a dense one.

    Args:
        module: Changed in place.
        layer: Decomposed as it is now in ``module``.
        rank: Width between the two.
    """
    old: Any = module.get_submodule(layer.name)
    made = FactorizedLinear(
        layer.in_features, rank, layer.out_features, bias=old.bias is not None
    ).to(old.weight.dtype)
    with torch.no_grad():
        first, second = layer.factors(old.weight, rank)
        made.reduce.weight.copy_(first)
        made.expand.weight.copy_(second)
        if old.bias is not None:
            made.expand.bias.copy_(old.bias)
            made.expand.bias.requires_grad_(old.bias.requires_grad)
    for part in (made.reduce, made.expand):
        part.weight.requires_grad_(old.weight.requires_grad)
    made.train(old.training)
    owner, _, attribute = layer.name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, made)


def factorize_by_energy(
    module: nn.Module,
    takes: InputSpec | Tensor,
    energy: float,
    *,
    keep_whole: Sequence[str] = (),
    tables: Sequence[LatencyTable] = (),
) -> list[DensePlan]:
    """Factorise every dense layer that gains by it.

    Args:
        module: Changed in place.
        takes: What it takes, or an example.
        energy: Share of the squared weights that each keeps at least, 0 to 1.
        keep_whole: Layers that stay as they are.
        tables: Of the targets that the file may have: a layer is factorised where it gets
            faster in one of them. Time is not looked at without.

    Returns:
        What became of each dense layer.
    """
    layers, plans = find_dense(module, takes, keep_whole)
    operations = {o.name: o for o in list_operations(module, takes)}
    for layer in layers:
        sides = (layer.in_features, layer.out_features)
        rank = layer.rank_for(energy)
        told = f"{energy:.1%} of its energy need a rank of {rank}"
        if rank > layer.limit:
            plans.append(DensePlan(layer.name, *sides, 0, 1.0, f"{told}, which saves nothing"))
            continue
        timed = [_times(table, operations[layer.name], rank) for table in tables]
        if timed and not any(after < before for before, after in timed):
            before, after = min(timed, key=lambda pair: pair[1] - pair[0])
            plans.append(
                DensePlan(
                    layer.name, *sides, 0, 1.0,
                    f"{told}, which is not faster: {after:.1f} instead of {before:.1f} µs",
                )
            )  # fmt: skip
            continue
        put_factors(module, layer, rank)
        plans.append(DensePlan(layer.name, *sides, rank, layer.energy(rank), told))
    return plans


def _times(table: LatencyTable, operation: Operation, rank: int) -> tuple[float, float]:
    """Return the microseconds of a dense layer as it is and factorised."""
    kernels = [kernel_of(operation, operation.channels())]
    kernels += [kernel_of(o, o.channels()) for o in split(operation, operation.channels(), rank)]
    found = [kernel for kernel in kernels if kernel is not None]
    table.measure(found)
    times = [table[kernel] for kernel in found]
    return times[0], sum(times[1:])


def split(
    operation: Operation, channels: tuple[int, int], rank: int
) -> tuple[Operation, Operation]:
    """Return the two operations that a factorised dense layer runs as."""
    ins, outs = channels
    first = replace(
        operation, inputs=(("", ins),), outputs=(("", rank),), activation="", adds=False
    )
    return first, replace(operation, inputs=(("", rank),), outputs=(("", outs),))


def outer_names(module: nn.Module) -> dict[str, str]:
    """Return the names of layers within factorised ones → that of the dense layer.

    The first of the two layers has no outputs that the dense layer had; its name is "".
    """
    found: dict[str, str] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, FactorizedLinear):
            found[f"{name}.reduce"] = ""
            found[f"{name}.expand"] = name
    return found


def ranks_now(module: nn.Module, plans: Sequence[DensePlan]) -> list[DensePlan]:
    """Return ``plans`` with the ranks that the factorised layers have by now."""
    ranks: Mapping[str, int] = {
        name: layer.rank
        for name, layer in module.named_modules()
        if isinstance(layer, FactorizedLinear)
    }
    return [replace(p, rank=ranks[p.name]) if p.name in ranks else p for p in plans]
