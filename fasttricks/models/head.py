"""The classifier of a network, by name: the layers whose outputs are the classes; and the features that enter it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttricks.config import require

AUXILIARY = "AuxLogits."
"""Prefix of the keys of Inception's auxiliary classifier, which a network may go without."""
COUNTER = "num_batches_tracked"
"""End of the keys of batch norm's counters, which old files lack and nothing here reads."""
BASE = "backbone"
"""The module that is the base network of another task's network, as in torchvision's models of segmentation and detection."""
PYRAMID = f"{BASE}.body"
"""The same where a feature pyramid is on it, as in torchvision's Faster R-CNN."""
WRAPPED = "of_timm"
"""The module in a base network that is timm's."""
_HEADS = ("fc", "classifier", "head")
"""Names of a classifier: torchvision's and ours; of the first that a network has, the last layer is the classifier."""


def head_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the classifier's parameters in `model`, as its state_dict has them; empty where no classifier is found.

    ("fc.weight", "fc.bias"), and for an Inception with an auxiliary head also AuxLogits.fc.weight and AuxLogits.fc.bias. The
    classifier is the layer, or the layers, that a method get_classifier() returns, as timm's networks have it; else the last
    layer with parameters of the module fc, classifier or head.
    """
    layers = {id(layer) for layer in (*_classifiers(model), *_auxiliary(model))}
    named = [(name, module) for name, module in model.named_modules() if id(module) in layers]
    return tuple(f"{prefix}.{name}" for prefix, module in named for name, _ in module.named_parameters())


def base_prefix(model: nn.Module) -> str:
    """The prefix that the keys of a classifier's weights have in `model`, which is built on it; empty for a classifier."""
    for path in (BASE, PYRAMID):
        try:
            base = model.get_submodule(path)
        except AttributeError:
            continue
        if hasattr(base, "features"):
            return f"{path}.{WRAPPED}." if hasattr(base, WRAPPED) else f"{path}."
    return ""


def new_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters and buffers of `model` that no classifier's weights have: those of the heads on a base network;
    else, as head_names(), those of the classifier."""
    if not (prefix := base_prefix(model)):
        return head_names(model)
    return tuple(name for name in model.state_dict() if not name.startswith(prefix))


def _classifiers(model: nn.Module) -> list[nn.Module]:
    if callable(get := getattr(model, "get_classifier", None)):
        found = get()
        return [
            layer for layer in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(layer, nn.Module)
        ]
    for name in _HEADS:
        if isinstance(head := getattr(model, name, None), nn.Module) and (last := _last_layer(head)) is not None:
            return [last]
    return []


def _last_layer(module: nn.Module) -> nn.Module | None:
    """`module`, or the last layer within it that has parameters of its own; None where none has."""
    return next((one for one in reversed(list(module.modules())) if list(one.parameters(recurse=False))), None)


def _auxiliary(model: nn.Module) -> list[nn.Module]:
    head = getattr(getattr(model, "AuxLogits", None), "fc", None)
    last = _last_layer(head) if isinstance(head, nn.Module) else None
    return [] if last is None else [last]


class Embedder:
    """The features from which the classifier of `model` makes the classes, kept as a forward pass hands them to it.

    Raises ConfigError for a network in which no classifier is found.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = _classifiers(model)
        rule = "finds no classifier in the network, whose input it would keep; give it a method get_classifier()"
        require(bool(layers), "embed", True, rule)
        self._kept: list[Tensor] = []
        for layer in layers:
            layer.register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0].detach().float()
        if features.dim() > 2:  # one vector a place: channels come last in a linear layer, second in a convolution
            last = isinstance(layer, nn.Linear)
            features = features.flatten(1, -2).mean(1) if last else features.flatten(2).mean(2)
        self._kept.append(features)

    def take(self) -> Tensor:
        """The features since the last time, (N, D) in float32: one vector an image, its mean over the places of a map, the
        classifiers of a distilled network and several passes over the images, as of their mirror images.

        Raises ConfigError where the classifier was not called, or with inputs of several shapes.
        """
        kept, self._kept[:] = list(self._kept), []
        shapes = sorted({tuple(one.shape) for one in kept})
        rule = (
            f"the classifier of the network must get one vector an image, but got {shapes or 'none'}; leave --embed out"
        )
        require(len(shapes) == 1 and len(shapes[0]) == 2, "embed", True, rule)
        return torch.stack(kept).mean(0)
