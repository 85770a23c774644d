"""The list of zoo models."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from pollard.compress.errors import ModelUnknown
from pollard.compress.spec import InputSpec
from pollard.compress.truth import TaskName
from pollard.compress.zoo.cifar_resnet import resnet20, resnet56
from pollard.compress.zoo.detector import SmallFcos
from pollard.compress.zoo.inception import inception_v3
from pollard.compress.zoo.mobilenet import mobilenet_v2, mobilenet_v2_cifar
from pollard.compress.zoo.resnet import resnet18, resnet34, resnet50
from pollard.compress.zoo.small import SmallCnn28, SmallCnn224, SmallCnn512
from pollard.compress.zoo.unet import SmallUNet
from pollard.compress.zoo.vgg import CifarVgg, vgg16, vgg16_bn


@dataclass(frozen=True)
class TrainDefaults:
    """How a model is best trained from scratch, when nothing else is said."""

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 2e-3
    """Peak of a one-cycle schedule."""
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    recover_epochs: int = 8
    """Epochs of fine-tuning after pruning."""
    recover_learning_rate: float = 1e-3


@dataclass(frozen=True)
class Entry:
    """One zoo model."""

    name: str
    summary: str
    build: Callable[[int], nn.Module]
    """From the number of classes to the module."""
    spec: InputSpec
    classes: int = 10
    """Classes of published checkpoints; another number is possible."""
    training: TrainDefaults = TrainDefaults()
    task: TaskName = "classification"


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR_INPUT = InputSpec(32, 32, 3, IMAGENET_MEAN, IMAGENET_STD, augmentation="crop-flip")
_CIFAR_TRAINING = TrainDefaults(
    epochs=60,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=5e-4,
    optimizer="sgd",
    recover_epochs=4,
    recover_learning_rate=0.02,
)

_IMAGENET_INPUT = InputSpec(
    224, 224, 3, IMAGENET_MEAN, IMAGENET_STD, augmentation="crop-flip", short_side=256
)
_IMAGENET_TRAINING = TrainDefaults(
    epochs=90,
    batch_size=32,
    learning_rate=0.0125,
    optimizer="sgd",
    recover_epochs=3,
    recover_learning_rate=2e-3,
)


_INCEPTION_INPUT = InputSpec(
    299, 299, 3, (0.5,) * 3, (0.5,) * 3, augmentation="crop-flip", short_side=342
)


# One zero point for all channels: in 8 bits the pixels are the network's input as they are.
_SCENE_INPUT = InputSpec(
    96, 96, 3, (128 / 255,) * 3, (0.25,) * 3, augmentation="crop-flip", letterbox=True
)


def _imagenet(
    name: str, title: str, build: Callable[[int], nn.Module], spec: InputSpec = _IMAGENET_INPUT
) -> Entry:
    return Entry(name, f"torchvision's {title}", build, spec, 1000, _IMAGENET_TRAINING)


ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "small-cnn-28",
            "2 convolutions, 2 dense layers",
            SmallCnn28,
            # Plain scaling to 0-1, as in the tutorials; it folds into the first
            # convolution without a trace.
            InputSpec(28, 28, 1, (0.0,), (1.0,), augmentation="shift"),
            training=TrainDefaults(
                learning_rate=4e-3,
                weight_decay=1e-2,
                recover_epochs=14,
                recover_learning_rate=4e-3,
            ),
        ),
        Entry(
            "small-cnn-224",
            "3 convolutions, 1 dense layer",
            SmallCnn224,
            InputSpec(224, 224, 3, (0.0,) * 3, (1.0,) * 3, augmentation="crop-flip"),
            training=TrainDefaults(epochs=10, batch_size=16, learning_rate=1e-3, recover_epochs=3),
        ),
        Entry(
            "small-cnn-512",
            "4 convolutions, 2 dense layers",
            SmallCnn512,
            InputSpec(150, 150, 3, (0.0,) * 3, (1.0,) * 3, augmentation="crop-flip"),
            classes=2,
            training=TrainDefaults(epochs=15, batch_size=32, learning_rate=1e-3, recover_epochs=4),
        ),
        Entry(
            "resnet20-cifar",
            "ResNet-20 with option-A shortcuts",
            resnet20,
            _CIFAR_INPUT,
            training=_CIFAR_TRAINING,
        ),
        Entry(
            "resnet56-cifar",
            "ResNet-56 with option-A shortcuts",
            resnet56,
            _CIFAR_INPUT,
            training=_CIFAR_TRAINING,
        ),
        Entry(
            "vgg16-bn-cifar",
            "the convolutions of VGG-16 with batch norms, one dense layer",
            CifarVgg,
            _CIFAR_INPUT,
            training=replace(_CIFAR_TRAINING, learning_rate=0.05),
        ),
        Entry(
            "mobilenet-v2-cifar",
            "MobileNetV2 with two strides fewer",
            mobilenet_v2_cifar,
            _CIFAR_INPUT,
            training=_CIFAR_TRAINING,
        ),
        _imagenet("resnet18", "ResNet-18", resnet18),
        _imagenet("resnet34", "ResNet-34", resnet34),
        _imagenet("resnet50", "ResNet-50", resnet50),
        _imagenet("vgg16", "VGG-16", vgg16),
        _imagenet("vgg16-bn", "VGG-16 with batch norms", vgg16_bn),
        # Its checkpoints were made with pixels from −1 to 1.
        _imagenet("inception-v3", "Inception v3", inception_v3, _INCEPTION_INPUT),
        _imagenet("mobilenet-v2", "MobileNetV2", mobilenet_v2),
        Entry(
            "small-fcos",
            "anchor-free detector of one stage; boxes and scores of 12×12 cells",
            SmallFcos,
            _SCENE_INPUT,
            classes=5,
            training=TrainDefaults(
                epochs=12,
                batch_size=16,
                learning_rate=4e-3,
                recover_epochs=5,
                recover_learning_rate=2e-3,
            ),
            task="detection",
        ),
        Entry(
            "small-unet",
            "U-Net of three levels; a class for each pixel",
            SmallUNet,
            _SCENE_INPUT,
            classes=6,
            training=TrainDefaults(
                epochs=6,
                batch_size=8,
                learning_rate=4e-3,
                recover_epochs=2,
                recover_learning_rate=2e-3,
            ),
            task="segmentation",
        ),
    )
}


def find(name: str) -> Entry:
    """Return the zoo model called ``name``.

    Raises:
        ModelUnknown: there is none; the message names the nearest.
    """
    entry = ENTRIES.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, ENTRIES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ModelUnknown(
            f"the zoo has no model {name!r}{hint} It has: {', '.join(sorted(ENTRIES))}"
        )
    return entry
