"""What a recipe says of 8-bit files: how they may be made, and what they are chosen by."""

from __future__ import annotations

from pollard.compress.candidates import Tuning
from pollard.compress.data import Dataset
from pollard.compress.evaluate import predict_part, torch_predictor
from pollard.compress.fake_quantize import trainer
from pollard.compress.models import LoadedModel
from pollard.compress.progress import Reporter
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.tasks import task_of
from pollard.compress.training import FitConfig

# Weights are near their place already: training in 8 bits moves them less than recovery.
_SLOWER = 10


def quantize_config(recipe: Recipe) -> QuantizeConfig | None:
    """Return how a recipe, with its defaults filled in, quantizes; None for float only."""
    if recipe.target != "cpu-int8":
        return None
    return QuantizeConfig(
        recipe.calibration_images,
        not recipe.vnni,
        recipe.calibration,
        recipe.equalize,
        recipe.correct_biases,
        recipe.float_layers,
    )


def chosen_by(recipe: Recipe) -> dict[str, object]:
    """Return the part of a recipe that decides which 8-bit file is chosen, and how one trains."""
    fields = (
        "max_drop",
        "qat_epochs",
        "batch_size",
        "learning_rate",
        "seed",
        "distill_weight",
        "distill_temperature",
    )
    return {name: getattr(recipe, name) for name in fields}


def make_tuning(recipe: Recipe, parent: LoadedModel, data: Dataset, reporter: Reporter) -> Tuning:
    """Return what a recipe, with its defaults filled in, chooses 8-bit files by."""
    spec, defaults = parent.spec, parent.source.training
    answers = predict_part(torch_predictor(parent.module, spec), data.choose, 256)
    classes = len(data.classes)
    verdict = task_of(data.task).judge(answers, data.choose, classes)
    train = None
    if epochs := recipe.qat_epochs:
        config = FitConfig(
            epochs=epochs,
            batch_size=recipe.batch_size or defaults.batch_size,
            learning_rate=(recipe.learning_rate or defaults.recover_learning_rate) / _SLOWER,
            weight_decay=defaults.weight_decay,
            optimizer=defaults.optimizer,
            seed=recipe.seed,
            distill_weight=recipe.distill_weight,
            distill_temperature=recipe.distill_temperature,
        )
        train = trainer(parent.module, data, spec, config, reporter)
    return Tuning(data.choose, verdict, classes, recipe.max_drop, train)
