"""Begin from what another network has learnt: other classes on the same backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pollard.compress.errors import UsageInvalid
from pollard.compress.macs import layer_costs
from pollard.compress.models import load_state
from pollard.compress.spec import InputSpec


def find_head(module: nn.Module, spec: InputSpec) -> str:
    """Return the name of the layer that gives the logits: the last that runs."""
    return layer_costs(module, spec)[-1].name


def load_backbone(
    module: nn.Module, spec: InputSpec, state: Mapping[str, Tensor], path: Path | str
) -> bool:
    """Copy another network's weights, all but a head for other classes.

    Args:
        module: What to fill.
        spec: What it takes.
        state: Weights of the same architecture.
        path: Where they come from, for messages.

    Returns:
        Whether the head was taken over, too: it had the same classes.

    Raises:
        WeightsInvalid: keys other than the head's are missing, extra or misshaped; all are
            listed, and nothing is loaded.
    """
    own = dict(module.state_dict())
    # Inception's second classifier is a head as well.
    heads = {find_head(module, spec), "AuxLogits.fc"}
    fresh = {
        key: value
        for key, value in own.items()
        if key.rpartition(".")[0] in heads and key in state and state[key].shape != value.shape
    }
    load_state(module, {**state, **fresh}, path)
    return not fresh


@dataclass(frozen=True)
class Frozen:
    """Which layers learn, and from which epoch on."""

    stages: tuple[tuple[str, ...], ...]
    """Names of modules with parameters; the head first, then from the last to the first."""
    every: int = 0
    """Epochs after which the next stage begins to learn; 0: never."""

    def learning(self, epoch: int) -> set[str]:
        """Return the modules that learn in an epoch, which is counted from 1."""
        count = 1 + ((epoch - 1) // self.every if self.every else 0)
        return {name for stage in self.stages[:count] for name in stage}

    def apply(self, module: nn.Module, epoch: int) -> None:
        """Let the parameters of an epoch learn; frozen batch norms keep their statistics."""
        learning = self.learning(epoch)
        layers = dict(module.named_modules())
        for stage in self.stages:
            for name in stage:
                for parameter in layers[name].parameters(recurse=False):
                    parameter.requires_grad_(name in learning)
                if name not in learning:
                    layers[name].eval()


def freeze_backbone(module: nn.Module, spec: InputSpec, every: int = 0) -> Frozen:
    """Plan to train the head, and then one block more each ``every`` epochs.

    Raises:
        UsageInvalid: the head is all that there is.
    """
    head = find_head(module, spec)
    stages: dict[str, list[str]] = {}
    for name, layer in module.named_modules():
        if name != head and any(True for _ in layer.parameters(recurse=False)):
            # Blocks are members of the outermost sequences, such as "layer3.1".
            stages.setdefault(".".join(name.split(".")[:2]), []).append(name)
    if not stages:
        raise UsageInvalid("there is nothing to freeze: the model is its head alone")
    return Frozen(((head,), *(tuple(names) for names in reversed(stages.values()))), every)
