"""The networks by name: `MODELS` lists them, `build_model` makes the one that a config asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fasttricks.config import TIMM, ModelConfig, TrainConfig, model_info, nearest, require
from fasttricks.models.cifarnet import CifarNet
from fasttricks.models.convolution import OF_CONV2D as OF_CONV2D
from fasttricks.models.convolution import convolution_arithmetic as convolution_arithmetic
from fasttricks.models.head import AUXILIARY as AUXILIARY
from fasttricks.models.head import COUNTER as COUNTER
from fasttricks.models.head import Embedder as Embedder
from fasttricks.models.head import base_prefix as base_prefix
from fasttricks.models.head import head_names as head_names
from fasttricks.models.head import new_names as new_names
from fasttricks.models.inception import InceptionV3
from fasttricks.models.mobilenet import MobileNetV1
from fasttricks.models.norm import BatchNormAct as BatchNormAct
from fasttricks.models.norm import fused_arithmetic as fused_arithmetic
from fasttricks.models.norm import norm_of as norm_of
from fasttricks.models.norm import settle_counts as settle_counts
from fasttricks.models.norm import synchronized as synchronized
from fasttricks.models.norm import use_norm as use_norm
from fasttricks.models.parts import find_part as find_part
from fasttricks.models.resnet import LAYOUTS, ResNet, resnet_a, resnet_b, resnet_c, resnet_d
from fasttricks.models.whitening import whiten as whiten

MODELS: dict[str, Callable[..., nn.Module]] = {
    **{
        f"resnet{depth}{letter}": partial(ResNet, variant(depth))
        for depth in LAYOUTS
        for letter, variant in {"a": resnet_a, "b": resnet_b, "c": resnet_c, "d": resnet_d}.items()
    },
    "inception_v3": InceptionV3,
    "mobilenet_v1": MobileNetV1,
    "cifarnet": CifarNet,
}
"""Name -> constructor(*, num_classes, and the options that config.model_info gives it), each with the default of the paper.

There is no plain resnet50: it is A in the paper and B in torchvision and timm, so a name always says its variant.
"""


def build_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network that `config` trains for its task, in FP32 on torch's default device, in training mode.

    A classifier as build_model() has it, or that of _OF_TASKS, as fcn.build_fcn() of segmentation. Raises as they do.
    """
    return _OF_TASKS.get(config.task, _classifier)(config, num_classes)


def _classifier(config: TrainConfig, num_classes: int) -> nn.Module:
    return build_model(config.model, num_classes)


def _fcn(config: TrainConfig, num_classes: int) -> nn.Module:
    from fasttricks.models.fcn import build_fcn  # which builds on this

    return build_fcn(config.model, config.segment, num_classes)


def _detector(config: TrainConfig, num_classes: int) -> nn.Module:
    from fasttricks.models.detector import build_detector  # which builds on this

    return build_detector(config.model, config.detect, num_classes)


_OF_TASKS: dict[str, Callable[[TrainConfig, int], nn.Module]] = {"segmentation": _fcn, "detection": _detector}
"""The network of a task that is no classifier's."""


def build_model(config: ModelConfig, num_classes: int, **more: Any) -> nn.Module:
    """The network of `config` with `num_classes` outputs, in FP32 on torch's default device, in training mode.

    num_classes: 1 or more, as counted in the data (config.num_classes may be 0, so it is not read here). more: further arguments
    of the constructor, for a network of ours.
    Raises ConfigError for an unknown name, with the nearest right one, and for num_classes below 1; for a name of timm's
    as external.timm_model does; for a user's own as own.own_model does, which imports it. Initial weights come from torch's
    global generator: torch.manual_seed before the call fixes them, and a network that is made on the CPU and moved has the
    same ones on every device.
    """
    require(num_classes >= 1, "num_classes", num_classes, "must be 1 or more: the number of classes in the data")
    if config.name.startswith(TIMM):
        from fasttricks.models.external import timm_model

        return timm_model(config.name, num_classes=num_classes)
    if model_info(config.name).family == "own":
        from fasttricks.models.own import own_model

        return own_model(config.name, num_classes=num_classes)
    require(config.name in MODELS, "model.name", config.name, _unknown_name_rule(config.name))
    options: dict[str, Any] = {option: getattr(config, option) for option in model_info(config.name).options}
    return MODELS[config.name](num_classes=num_classes, **options, **more)


def _unknown_name_rule(name: str) -> str:
    where = f"fasttricks.models.MODELS lists all, {TIMM}NAME is timm's NAME, and PACKAGE.MODULE:FACTORY your own"
    name = name.lower()
    if f"{name}b" in MODELS:
        return f"needs its variant: {name}b is {name} in torchvision and timm, {name}a the original; {where}"
    return f"is no model; the nearest is {nearest(name, MODELS)}; {where}"
