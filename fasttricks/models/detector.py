"""Faster R-CNN (Ren et al. 2015) with a feature pyramid (Lin et al. 2017) on a base network: a detector of objects (section 6.1).

All of it is torchvision's but the base network. The state-dict keys are those of its fasterrcnn_resnet50_fpn, whose weights
load strictly into the one on our ResNet-50-B. tests/test_models_detector.py compares them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from fasttricks.config import ConfigError, DetectConfig, ModelConfig, model_info, require
from fasttricks.models.base import base_network
from fasttricks.system.extras import missing_extra

if TYPE_CHECKING:
    from fasttricks.models.faster_rcnn import Detector

_MAPS = 4
"""Feature maps of the base network that are used, at most: the last ones."""
_SHIFTED = ("inception", "cifarnet")
"""Families whose feature maps are not centred on the image."""


def build_detector(model: ModelConfig, detect: DetectConfig, num_classes: int) -> Detector:
    """The network of `model` and `detect` for so many classes, 1 or more, in FP32 on torch's default device, in training mode.

    Initial weights: the base network's as build_model has them, all others as torchvision makes them, from torch's global
    generator. Raises ConfigError as base_network, for a network whose feature maps make no pyramid, and where torchvision is
    absent.
    """
    if missing := missing_extra("transfer", ["torchvision"], "task detection"):
        raise ConfigError(missing)
    from fasttricks.models.faster_rcnn import Detector

    base = base_network(model, 32, maps=_MAPS)
    _check_pyramid(model.name, base)
    return Detector(base, detect, num_classes)


def _check_pyramid(name: str, base: nn.Module) -> None:
    strides: tuple[int, ...] = base.feature_strides  # type: ignore[assignment]
    halves = len(strides) > 1 and all(2 * a == b for a, b in pairwise(strides))
    found = f"its feature maps have the strides {', '.join(map(str, strides))}"
    rule = f"makes no feature pyramid: each map must have half the sides of the one before, and {found}"
    require(halves, "model.name", name, f"{rule}; take a ResNet, a MobileNet or another of timm's with such maps")
    rule = "makes no feature pyramid: its convolutions without padding shift the maps against the image"
    require(
        model_info(name).family not in _SHIFTED, "model.name", name, f"{rule}; take a ResNet, MobileNet or timm:NAME"
    )
