"""Base networks: a classifier without its classifier, whose features a head of another task reads (section 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttricks.config import TIMM, ModelConfig, model_info, require
from fasttricks.models import build_model
from fasttricks.models.external import timm_features
from fasttricks.models.head import WRAPPED, base_prefix, head_names

_DILATED = ("resnet", "mobilenet")
"""Families of ours that have an output_stride."""


class TimmBase(nn.Module):
    """A network of timm: features() is its last `maps` feature maps."""

    def __init__(self, name: str, output_stride: int, maps: int) -> None:
        super().__init__()
        wrapped = timm_features(name, output_stride, maps)
        setattr(self, WRAPPED, wrapped.model)
        self._indices = wrapped.out_indices
        self.feature_channels = tuple(wrapped.feature_info.channels())
        self.feature_strides = tuple(wrapped.feature_info.reduction())

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """The feature maps, (N, channels, H / s, W / s), as feature_channels and feature_strides say."""
        found: list[Tensor] = getattr(self, WRAPPED).forward_intermediates(
            images_NCHW, indices=self._indices, output_fmt="NCHW", intermediates_only=True
        )
        return tuple(found)


def base_network(config: ModelConfig, output_stride: int, *, maps: int = 2) -> nn.Module:
    """The network of `config` without its classifier, in FP32 on torch's default device, in training mode.

    It has features(), feature_channels and feature_strides. output_stride: the factor by which the last features are smaller than
    the image, at most. maps: feature maps of a network of timm, its last ones; ours have all. Initial weights as build_model has
    them. Raises ConfigError for a network that has no features or no such stride, and as build_model.
    """
    name, family = config.name, model_info(config.name).family
    require(
        family != "own", "model.name", name, "has no features that are known here; take a network of ours or of timm"
    )
    if name.startswith(TIMM):
        return TimmBase(name, output_stride, maps).train()
    rule = f"{name} has no dilated stages; give 32, or a ResNet or MobileNet as --model.name"
    dilates = family in _DILATED or not family  # an unknown name, which build_model refuses
    require(output_stride == 32 or dilates, "segment.output_stride", output_stride, rule)
    model = build_model(config, 1, **({"output_stride": output_stride} if family in _DILATED else {}))
    for layer in {key.rpartition(".")[0] for key in head_names(model)}:
        parent, _, child = layer.rpartition(".")
        delattr(model.get_submodule(parent), child)
    return model


def left_out(model: nn.Module, config: ModelConfig) -> frozenset[str]:
    """The keys, with the prefix, that the classifier of `config` has and the base network in `model` lacks."""
    with torch.device("meta"):
        whole: Any = build_model(config, 2)
    kept, prefix = model.state_dict().keys(), base_prefix(model)
    return frozenset(f"{prefix}{key}" for key in whole.state_dict() if f"{prefix}{key}" not in kept)
