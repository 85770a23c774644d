"""Choose widths and blocks so that a budget is met at the least loss.

HALP (Shen et al., 2022) chooses channels as a knapsack: the worth of each against the
latency that it adds, from a table of measured latencies. Here the same is done over whole
widths, because kernels work in blocks of channels, and whole residual blocks are among the
choices. A layer's latency depends on the channels on both of its sides, so costs are not
additive: the knapsack is filled by the best ratio of loss to cost, one choice at a time,
each cost read from the table for the network as it is by then, and choices that turned out
to be more than enough are taken back at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pollard.compress.budget import Budget, amount
from pollard.compress.dense import split
from pollard.compress.errors import PruneFailed
from pollard.compress.kernels import Kernel, kernel_of
from pollard.compress.latency import LatencyTable
from pollard.compress.operations import Operation
from pollard.compress.progress import Reporter

# Widths offered for a group: steps of this many channels, or a sixteenth of wide groups.
_STEP = 8
_OPTIONS = 16

# Input and output widths of one layer whose product is measured ahead.
_AHEAD = 80

# No choice is for nothing, whatever noise says.
_LEAST_LOSS = 1e-4

# Resources that fewer weights help, whatever time they take.
_SMALLER = {"size", "params"}

Costs = Mapping[str, float]
"""Resource → what is taken, in the units of :mod:`pollard.compress.budget`."""


@dataclass(frozen=True)
class Choice:
    """Something that can be narrowed: a group of channels."""

    name: str
    layers: tuple[str, ...]
    width: int
    unit: int
    """Channels that go together, such as a value and its gate."""
    losses: Mapping[int, float]
    """Width → loss expected of it by itself; the whole width costs nothing."""


@dataclass(frozen=True)
class State:
    """Widths by group, and the blocks that are gone."""

    widths: Mapping[str, int]
    removed: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Dense layer → rank of the product in its place; those that stay whole are not named."""


@dataclass(frozen=True)
class Picked:
    """What :func:`choose` came to."""

    state: State
    loss: float
    """Sum of the expected losses."""
    before: Costs
    after: Costs
    limits: Costs


def options(width: int, unit: int = 1) -> list[int]:
    """Return the widths, in units of channels that go together, below ``width``; never 0."""
    channels = width * unit
    step = max(
        _STEP, -(-channels // (_OPTIONS * 16)) * 16 if channels > _STEP * _OPTIONS else _STEP
    )
    if channels <= step:
        step = max(2, channels // 4)
    step = max(1, step // unit)
    return list(range(step, width, step))


@dataclass
class CostModel:
    """What a network takes at any widths, from a latency table."""

    operations: Sequence[Operation]
    choices: Sequence[Choice]
    table: LatencyTable
    fixed: Sequence[Kernel] = ()
    """Kernels that are always there."""
    bytes_per_weight: float = 4.0
    bytes_besides: float = 0.0
    """Of the file, for each operator."""
    dense: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Dense layer that can be factorised → rank → loss expected of it by itself."""
    _rows: dict[tuple[int, int, int, int], tuple[float, float, float]] = field(default_factory=dict)

    def prepare(self, reporter: Reporter | None = None) -> None:
        """Measure the rows that are sure to be needed."""
        wanted: list[Kernel] = list(self.fixed)
        by_layer = {layer: choice for choice in self.choices for layer in choice.layers}
        for operation in self.operations:
            sides = [
                {by_layer[name].name: by_layer[name] for name, _ in pieces if name in by_layer}
                for pieces in (operation.inputs, operation.outputs)
            ]
            near = {**sides[0], **sides[1]}
            combinations: list[dict[str, float]] = [{}]
            for choice in near.values():
                shares = [w / choice.width for w in (*choice.losses, choice.width)]
                combinations = [
                    {**kept, **dict.fromkeys(choice.layers, share)}
                    for kept in combinations
                    for share in shares
                ]
                if len(combinations) > _AHEAD:
                    combinations = [{}]
                    break
            for kept in combinations:
                kernel = kernel_of(operation, operation.channels(kept))
                if kernel is not None:
                    wanted.append(kernel)
        self.table.measure(wanted, reporter=reporter)

    def whole(self) -> State:
        """Return the state in which nothing is cut."""
        return State({choice.name: choice.width for choice in self.choices})

    def costs(self, state: State) -> dict[str, float]:
        """Return what the network takes in ``state``."""
        kept = self._kept(state.widths)
        total = {"latency": self.table.overheads.per_run, "macs": 0.0, "params": 0.0, "size": 0.0}
        total["latency"] += sum(self.table[kernel] for kernel in self.fixed)
        for index, operation in enumerate(self.operations):
            if any(operation.within(block) for block in state.removed):
                continue
            rank = state.ranks.get(operation.name, 0)
            latency, macs, params = self._row(index, operation.channels(kept), rank)
            total["latency"] += latency
            total["macs"] += macs
            total["params"] += params
            total["size"] += self.bytes_besides * (2 if rank else 1)
        total["size"] += total["params"] * self.bytes_per_weight
        return total

    def _kept(self, widths: Mapping[str, int]) -> dict[str, float]:
        return {
            layer: widths[choice.name] / choice.width
            for choice in self.choices
            for layer in choice.layers
            if widths[choice.name] != choice.width
        }

    def _row(self, index: int, channels: tuple[int, int], rank: int) -> tuple[float, float, float]:
        found = self._rows.get((index, *channels, rank))
        if found is None:
            operation = self.operations[index]
            if rank:
                first, second = (
                    self._cost(part, part.channels()) for part in split(operation, channels, rank)
                )
                # Two operators, of which only the second has a bias.
                params = first[2] - rank + second[2]
                found = first[0] + second[0], first[1] + second[1], params
            else:
                found = self._cost(operation, channels)
            self._rows[index, *channels, rank] = found
        return found

    def _cost(self, operation: Operation, channels: tuple[int, int]) -> tuple[float, float, float]:
        kernel = kernel_of(operation, channels)
        latency = 0.0
        if kernel is not None:
            if kernel.key not in self.table.rows:
                self.table.measure([kernel])
            latency = self.table[kernel]
        macs = params = 0.0
        if operation.is_layer and kernel is not None:
            each = kernel.kernel[0] * kernel.kernel[1] / kernel.groups
            params = kernel.in_channels * kernel.out_channels * each
            plane = operation.out_height * operation.out_width
            if operation.kind == "ConvTranspose":
                plane = operation.height * operation.width
            macs = params * (1 if operation.kind == "Gemm" else plane)
            params += kernel.out_channels
        return latency, macs, params


def choose(
    model: CostModel,
    blocks: Mapping[str, float],
    budgets: Sequence[Budget],
    reference: Costs,
    *,
    toward: float = 1.0,
) -> Picked:
    """Meet the budgets at the least expected loss.

    Args:
        model: What the network takes.
        blocks: Residual block that can go → loss expected of that.
        budgets: What may be taken.
        reference: What the parent's float file takes; shares are shares of it.
        toward: How far to go from here to the budgets, 0 to 1; a step of several goes
            part of the way.

    Raises:
        PruneFailed: they cannot be met; the message says how far one could go.
    """
    state = model.whole()
    before = model.costs(state)
    limits = {}
    for budget in budgets:
        limit = budget.limit(reference[budget.resource])
        now = before[budget.resource]
        limits[budget.resource] = now * (limit / now) ** toward if limit < now else limit
    loss = 0.0
    costs: Costs = before
    while (excess := _excess(costs, limits)) > 0:
        best: tuple[float, float, State, Costs] | None = None
        for move, cost_loss in _moves(model, blocks, state):
            after = model.costs(move)
            gain = excess - _excess(after, limits)
            if gain <= 1e-9:
                continue
            slower = after["latency"] >= costs["latency"]
            if move.ranks != state.ranks and slower and not _SMALLER & limits.keys():
                continue  # two operators in place of one must be worth it
            price = max(cost_loss, _LEAST_LOSS) / gain
            if best is None or price < best[0]:
                best = (price, cost_loss, move, after)
        if best is None:
            told = ", ".join(
                f"{b.resource} {amount(b.resource, costs[b.resource])} instead of at most "
                f"{amount(b.resource, b.limit(reference[b.resource]))}"
                for b in budgets
                if costs[b.resource] > limits[b.resource]
            )
            raise PruneFailed(
                f"the budget {', '.join(b.text for b in budgets)} cannot be met by narrowing, "
                f"removing blocks and factorising; the least is {told}. Allow more"
            )
        loss += best[1]
        state, costs = best[2], best[3]
    state, costs, loss = _give_back(model, blocks, state, costs, loss, limits)
    return Picked(state, loss, before, costs, limits)


def _excess(costs: Costs, limits: Costs) -> float:
    return sum(max(0.0, costs[name] / limit - 1) for name, limit in limits.items())


def _moves(
    model: CostModel, blocks: Mapping[str, float], state: State
) -> list[tuple[State, float]]:
    moves = []
    for choice in model.choices:
        now = state.widths[choice.name]
        already = choice.losses.get(now, 0.0)
        for width, loss in choice.losses.items():
            if width < now:
                widths = {**state.widths, choice.name: width}
                moves.append((replace(state, widths=widths), max(0.0, loss - already)))
    for block, loss in blocks.items():
        if block not in state.removed:
            moves.append((replace(state, removed=state.removed | {block}), loss))
    for layer, losses in model.dense.items():
        rank = state.ranks.get(layer)
        already = losses[rank] if rank is not None else 0.0
        for lower, loss in losses.items():
            if rank is None or lower < rank:
                ranks = {**state.ranks, layer: lower}
                moves.append((replace(state, ranks=ranks), max(0.0, loss - already)))
    return moves


def _give_back(
    model: CostModel,
    blocks: Mapping[str, float],
    state: State,
    costs: Costs,
    loss: float,
    limits: Costs,
) -> tuple[State, Costs, float]:
    """Take back the dearest choices that the budget has room for."""
    while True:
        moves: list[tuple[float, State]] = []
        for choice in model.choices:
            now = state.widths[choice.name]
            for width in (*choice.losses, choice.width):
                if width > now:
                    won = choice.losses[now] - choice.losses.get(width, 0.0)
                    moves.append((won, replace(state, widths={**state.widths, choice.name: width})))
        for block in state.removed:
            moves.append((blocks[block], replace(state, removed=state.removed - {block})))
        for layer, rank in state.ranks.items():
            losses = model.dense[layer]
            whole = {name: r for name, r in state.ranks.items() if name != layer}
            moves.append((losses[rank], replace(state, ranks=whole)))
            moves += [
                (losses[rank] - less, replace(state, ranks={**state.ranks, layer: higher}))
                for higher, less in losses.items()
                if higher > rank
            ]
        moves.sort(key=lambda move: move[0], reverse=True)
        for won, move in moves:
            after = model.costs(move)
            if won >= 0 and _excess(after, limits) <= 0:
                state, costs, loss = move, after, loss - won
                break
        else:
            return state, costs, max(0.0, loss)
