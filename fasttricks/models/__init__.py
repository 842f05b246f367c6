"""The networks by name: `MODELS` lists them, `build_model` makes the one that a config asks for."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from fasttricks.config import ModelConfig, require
from fasttricks.models.resnet import LAYOUTS, ResNet, resnet_a, resnet_b, resnet_c, resnet_d

MODELS: dict[str, Callable[..., nn.Module]] = {
    f"resnet{depth}{letter}": partial(ResNet, variant(depth))
    for depth in LAYOUTS
    for letter, variant in {"a": resnet_a, "b": resnet_b, "c": resnet_c, "d": resnet_d}.items()
}
"""Name -> constructor(*, num_classes, width, stem_stride, zero_gamma), each with the default of the paper.

There is no plain resnet50: it is A in the paper and B in torchvision and timm, so a name always says its variant.
"""


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The network of `config` with `num_classes` outputs, in FP32 on torch's default device, in training mode.

    num_classes: 1 or more, as counted in the data (config.num_classes may be 0, so it is not read here).
    Raises ConfigError for an unknown name, with the nearest right one, and for num_classes below 1.
    Initial weights come from torch's global generator: torch.manual_seed before the call fixes them, and a network
    that is made on the CPU and moved has the same ones on every device.
    """
    require(config.name in MODELS, "model.name", config.name, _unknown_name_rule(config.name))
    require(num_classes >= 1, "num_classes", num_classes, "must be 1 or more: the number of classes in the data")
    make = MODELS[config.name]
    return make(
        num_classes=num_classes,
        width=config.width,
        stem_stride=config.stem_stride,
        zero_gamma=config.zero_gamma,
    )


def _unknown_name_rule(name: str) -> str:
    where = "fasttricks.models.MODELS lists all"
    name = name.lower()
    if f"{name}b" in MODELS:
        return f"needs its variant: {name}b is what torchvision and timm call {name}, {name}a the original; {where}"
    nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)[0]
    return f"is no model; the nearest is {nearest}; {where}"
