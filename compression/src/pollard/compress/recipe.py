"""What a compression run is asked to do."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pollard.compress.budget import parse_budgets
from pollard.compress.errors import UsageInvalid
from pollard.compress.recipe_file import SCHEMA_VERSION
from pollard.compress.spec import InputSpec

Target = Literal["cpu-int8", "cpu-fp32", "cuda-fp16"]
CPU_TARGETS: tuple[Target, ...] = ("cpu-int8", "cpu-fp32")
TARGETS: tuple[Target, ...] = (*CPU_TARGETS, "cuda-fp16")

Method = Literal["min-max", "mse", "percentile-99.999", "percentile-99.99", "percentile-99.9"]
METHODS: tuple[Method, ...] = get_args(Method)
CALIBRATIONS: tuple[Method | Literal["auto"], ...] = ("auto", *METHODS)

Importance = Literal["l1", "l2", "bn", "taylor"]
IMPORTANCES: tuple[Importance, ...] = ("l1", "l2", "bn", "taylor")


@dataclass(frozen=True)
class Recipe:
    """One run of ``compress``; together with the seed it decides the model file.

    Raises:
        UsageInvalid: a value is out of its range.
    """

    model: str
    """"zoo:NAME", "package.module:factory" or the path of an ONNX file."""
    data: str
    """"digits", a directory, or a zip file."""
    weights: str
    """The trained parent: a state dict (.pt) or .safetensors."""
    target: Target = "cpu-int8"
    """What may be used: "cpu-int8" lets float files compete, too; "cpu-fp32"
    means float only; "cuda-fp16" is float16 for NVIDIA's GPUs."""
    prune: float = 0.5
    """Share of the MACs to remove; 0 does not prune. Not used with ``budget``."""
    budget: tuple[str, ...] = ()
    """What the shipped file may take, such as "latency=0.4" or "size=300kB"; shares are of
    the parent's float file. Widths and residual blocks are chosen by measured latency."""
    search: int = 0
    """Trials of a search for the budget of latency, the importance, and whether blocks
    may go; 0 does not search. Not used with ``budget``."""
    importance: Importance = "l2"
    """How channels are ranked: "l1", "l2", "bn" or "taylor"."""
    prune_steps: int = 2
    """Cuts on the way to a budget, with recovery between them."""
    remove_blocks: bool = True
    """Whether whole residual blocks may go for a budget."""
    max_drop: float = 1.0
    """Most accuracy that may be lost, in points."""
    epochs: int | None = None
    """Epochs of recovery; the model's own default when None."""
    batch_size: int | None = None
    """Images per step of recovery; the model's own default when None."""
    learning_rate: float | None = None
    """Peak learning rate of recovery; the model's own default when None."""
    distill_weight: float = 0.7
    """Share of the loss that is distillation."""
    distill_temperature: float = 4.0
    calibration_images: int = 512
    """Images that 8-bit ranges are measured on."""
    calibration: Method | Literal["auto"] = "auto"
    """How 8-bit ranges come from what was seen: "min-max", "mse", "percentile-99.999",
    "percentile-99.99" or "percentile-99.9"; "auto" compares them on the choosing part."""
    equalize: bool = True
    """Whether channels may be balanced between layers before they become 8 bits."""
    correct_biases: bool = True
    """Whether biases may make up for what rounding moves."""
    float_layers: bool = True
    """Whether layers may stay in float where 8 bits miss the gate."""
    qat_epochs: int | None = None
    """Epochs of training in 8 bits, where nothing else holds the gate or too much would
    stay in float; 0 never trains so; by the model's own default when None."""
    vnni: bool | None = None
    """Whether the machines that will serve have VNNI; this one decides when None."""
    max_train_images: int | None = None
    """Train on so many images only; all when None."""
    max_time: float | None = None
    """Minutes that the run may take, about: searching, recovery and training in 8 bits end
    with what they have, measuring follows. What fits depends on how busy the machine is."""
    keep_whole: tuple[str, ...] = ()
    """Layers whose outputs are not pruned, and that are not factorised."""
    factorize: float | None = None
    """Share of their squared weights that dense layers keep when two of a lower rank take
    their place, 0 to 1. With ``budget`` at least so much, and None leaves it to the budget;
    with ``prune``, None leaves them as they are. 0 never factorises."""
    seed: int = 0
    threads: int | None = None
    """PyTorch's threads; all cores when None. Their number changes the order of
    summation and with it the last bits of the result."""
    device: str = "auto"
    """What PyTorch trains and tries networks on, as for
    :func:`pollard.compress.accelerator.find`; files are judged on what they are for."""
    spec: InputSpec | None = None
    """What the model takes; needed for factories."""

    def __post_init__(self) -> None:
        _check(
            str(self.target) != "cuda-int8",
            "there is no target cuda-int8: onnxruntime's CUDA provider has no 8-bit convolutions "
            "and computes such files partly on the processor, slower than in float. Use cuda-fp16",
        )
        _check(self.target in TARGETS, f"target {self.target!r} is not one of {', '.join(TARGETS)}")
        _check(
            self.target in CPU_TARGETS or not (self.budget or self.search),
            f"budget and search go by operators timed on a processor, so there is none for "
            f"{self.target}; use prune",
        )
        _check(0 <= self.prune < 1, f"prune is {self.prune}; it must be at least 0 and below 1")
        parse_budgets(self.budget)
        _check(0 <= self.search <= 10_000, f"search is {self.search}; it is 0 to 10000 trials")
        _check(
            not (self.search and self.budget),
            "search and budget exclude each other: the search chooses the budget of latency",
        )
        _check(
            self.importance in IMPORTANCES,
            f"importance {self.importance!r} is not one of {', '.join(IMPORTANCES)}",
        )
        _check(1 <= self.prune_steps <= 20, f"prune_steps is {self.prune_steps}; it is 1 to 20")
        _check(0 <= self.max_drop <= 100, f"max_drop is {self.max_drop}; it is in points, 0 to 100")
        _check(self.epochs is None or self.epochs >= 0, f"epochs is {self.epochs}")
        _check(self.batch_size is None or self.batch_size > 1, f"batch_size is {self.batch_size}")
        _check(
            self.learning_rate is None or self.learning_rate > 0,
            f"learning_rate is {self.learning_rate}; it must be above 0",
        )
        _check(0 <= self.distill_weight <= 1, f"distill_weight is {self.distill_weight}")
        _check(self.distill_temperature > 0, f"distill_temperature is {self.distill_temperature}")
        _check(self.calibration_images > 0, f"calibration_images is {self.calibration_images}")
        _check(
            self.calibration in CALIBRATIONS,
            f"calibration {self.calibration!r} is not one of {', '.join(CALIBRATIONS)}",
        )
        _check(self.qat_epochs is None or self.qat_epochs >= 0, f"qat_epochs is {self.qat_epochs}")
        _check(
            self.max_time is None or self.max_time > 0,
            f"max_time is {self.max_time}; it is in minutes, above 0",
        )
        _check(
            self.factorize is None or 0 <= self.factorize < 1,
            f"factorize is {self.factorize}; it is at least 0 and below 1",
        )
        _check(0 <= self.seed < 2**63, f"seed is {self.seed}")
        _check(self.threads is None or self.threads > 0, f"threads is {self.threads}")

    @property
    def prunes(self) -> bool:
        """Whether anything is to be cut."""
        return bool(self.budget or self.search or self.prune or self.factorize)

    def public(self) -> dict[str, Any]:
        """Return the fields for bundle and report: files by name, not by path."""
        fields: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        fields["weights"] = Path(self.weights).name if self.weights else ""
        fields["data"] = Path(self.data).name
        return fields

    def to_json(self) -> str:
        """Return `public` as JSON with sorted keys."""
        return json.dumps(self.public(), sort_keys=True)


def _check(good: bool, message: str) -> None:
    if not good:
        raise UsageInvalid(message)
