"""Parts of a network by name: the stem against what a run to the first stage uses, unknown names, parts without weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttricks.config import ConfigError, ModelConfig
from fasttricks.models import build_model, find_part

FIRST_STAGE = {
    "resnet18d": "layer1",
    "mobilenet_v1": "blocks",
    "inception_v3": "Mixed_5b",
    "timm:resnet10t": "layer1",
    "timm:inception_v3": "Mixed_5b",
    "timm:vit_tiny_patch16_224": "blocks",
    "timm:efficientnet_b0": "blocks",
    "timm:convnext_atto": "stages",
    "torchvision:resnet18": "layer1",
}


def make(name: str) -> nn.Module:
    library, _, bare = name.rpartition(":")
    if library == "timm":
        import timm

        return timm.create_model(bare, num_classes=3)
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(bare, num_classes=3)
    return build_model(ModelConfig(name=bare), 3)


class ReachedError(Exception):
    """Ends a forward pass at the first stage; takes its input."""


@pytest.mark.parametrize("name", FIRST_STAGE)
def test_the_stem_is_what_the_input_of_the_first_stage_depends_on(name: str) -> None:
    """By autograd: the parameters through which that input has a gradient."""
    model = make(name)

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise ReachedError(inputs[0])

    stage = model.get_submodule(FIRST_STAGE[name])
    (next(iter(stage.children())) if isinstance(stage, nn.Sequential) else stage).register_forward_pre_hook(stop)
    side = 224 if "vit" in name else 96
    with pytest.raises(ReachedError) as reached:
        model(torch.zeros(2, 3, side, side))
    reached.value.args[0].sum().backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    stem = {id(parameter) for parameter in find_part(model, "stem").parameters}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in stem} == used


REFUSED = {
    "layer9": "unknown; did you mean 'layer3'?; the network has conv1, bn1, layer1, layer2, layer3, fc",
    "layer1.7": "unknown; did you mean 'layer1'?",
    "": "unknown; the network has",
    "maxpool": "has no weights; the network has",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_no_part_with_weights_is_refused_with_the_nearest(name: str) -> None:
    model = build_model(ModelConfig(name="resnet8d"), 3)
    with pytest.raises(ConfigError) as refused:
        find_part(model, name)
    assert str(refused.value).startswith(f"model.freeze = {name!r}: {REFUSED[name]}")


def test_a_network_without_a_stem_that_is_known_says_what_it_has() -> None:
    with pytest.raises(ConfigError, match=r"'stem': is no part that is known of this network; the network has 0, 2, "):
        find_part(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2))), "stem")
