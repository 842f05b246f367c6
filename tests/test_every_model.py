"""What every model of the registry must do, whatever it is. A new model is tested here by being registered."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fasttricks.config import ConfigError, DataConfig, LossConfig, ModelConfig, model_info
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.optim import parameter_groups
from fasttricks.learning.placement import place
from fasttricks.models import MODELS, build_model
from fasttricks.planning.footprint import footprint
from fasttricks.tasks.losses import Targets, training_loss
from lib.networks import on_meta, without_norms
from lib.tiny import ALONE, configure

every_model = pytest.mark.parametrize("name", MODELS)
DEEP = ("resnet101", "resnet152")
"""A second in each test, of the blocks of ResNet-50."""
every_model_the_deep_ones_slow = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith(DEEP) else name for name in MODELS]
)
KINDS = ("resnet8d", "resnet50d", "inception_v3", "mobilenet_v1", "cifarnet")
"""One of each family, with both blocks of the ResNets: for what takes long and does not depend on the depth."""
every_kind = pytest.mark.parametrize("name", KINDS)
SMALL = {"width": 0.125, "stem_stride": 2, "zero_gamma": True, "whitening": True, "identity_init": True}


def smallest_side(name: str) -> int:
    return 75 if name == "inception_v3" else 32


def small(name: str, **options: Any) -> nn.Module:
    """A narrow `name` with five classes and all the options it has, but for those given."""
    return MODELS[name](
        num_classes=5,
        **{option: options.get(option, SMALL[option]) for option in model_info(name).options if option in SMALL},
    )


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters but for the filters of a whitened layer."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def classifiers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def loss_of(logits: Tensor) -> Tensor:
    return training_loss(logits, Targets(torch.arange(len(logits)) % 5), LossConfig(smoothing=0.1))


@every_model
def test_full_size_is_built_from_a_config(name: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), num_classes=1000)
    assert model.training
    assert [layer.weight.shape for layer in classifiers(model)] == [(1000, model.num_features)]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@every_model
def test_an_option_that_it_has_no_use_for_is_refused(name: str) -> None:
    for option, value in {**SMALL, "aux_head": True}.items():
        if option in model_info(name).options:
            assert getattr(ModelConfig(name=name, **{option: value}), option) == value
        else:
            with pytest.raises(ConfigError, match=rf"model\.{option} = {value}: not for model\.name = '{name}'"):
                ModelConfig(name=name, **{option: value})


@every_model_the_deep_ones_slow
@pytest.mark.parametrize(("bf16", "zero_gamma"), [(False, False), (True, True)], ids=["fp32", "bf16-zero_gamma"])
def test_finite_gradients_reach_every_parameter(name: str, bf16: bool, zero_gamma: bool) -> None:
    torch.manual_seed(0)
    model, side = small(name, zero_gamma=zero_gamma), smallest_side(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(torch.randn(4, 3, side, side))
    assert logits.shape == (4, 5)
    assert logits.dtype == (torch.bfloat16 if bf16 else torch.float32)
    loss_of(logits).backward()
    for parameter_name, parameter in trained(model).items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # At gamma 0 only that gamma learns, and the rest of path A waits for it.
        zeroed_gamma = parameter_name.endswith("weight") and not parameter.any()
        if zeroed_gamma or not zero_gamma:
            assert parameter.grad.any(), f"no gradient reached {parameter_name}"


@every_kind
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_channels_last_goes_through_every_layer(name: str, precision: str) -> None:
    model, side = place(small(name), ALONE, precision), smallest_side(name)  # type: ignore[arg-type]
    wrong: list[str] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.numel() and output.stride(1) != 1:
            wrong.append(type(module).__name__)

    for module in model.modules():
        module.register_forward_hook(watch)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    images = torch.randn(2, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    assert model(images).dtype == dtype
    assert wrong == []
    for feature in model.features(images):
        assert feature.is_contiguous(memory_format=torch.channels_last)


@every_model_the_deep_ones_slow
def test_features_are_as_the_model_says(name: str) -> None:
    side = model_info(name).image_size
    images = torch.empty(2, 3, side, side, device="meta")
    for model in (on_meta(MODELS[name]), on_meta(lambda: small(name))):
        with without_norms():
            features = model.features(images)
        assert tuple(feature.shape[1] for feature in features) == model.feature_channels
        found = tuple(2 ** round(math.log2(side / feature.shape[2])) for feature in features)
        assert found == model.feature_strides
        assert model.num_features == model.feature_channels[-1]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith(DEEP) else name
        for name in MODELS
        if model_info(name).timm
    ],
)
def test_features_are_those_that_timm_says(name: str) -> None:
    """Our last ones: timm's networks give the stem's besides."""
    timm = pytest.importorskip("timm")
    ours, theirs = on_meta(MODELS[name]), on_meta(lambda: timm.create_model(model_info(name).timm))
    said = theirs.feature_info[-len(ours.feature_channels) :]
    assert tuple(feature["num_chs"] for feature in said) == ours.feature_channels
    assert tuple(feature["reduction"] for feature in said) == ours.feature_strides


@every_kind
def test_a_batch_of_no_images_gives_no_loss_and_no_gradient(name: str) -> None:
    model, side = small(name), smallest_side(name)
    loss = loss_of(model(torch.empty(0, 3, side, side)))
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in trained(model).values())


@pytest.mark.slow
@every_kind
def test_compiles_into_one_graph(name: str) -> None:
    model, side = small(name).eval(), smallest_side(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, side, side)
    assert torch.equal(compiled(images), model(images))
    model.train()
    compiled(images)


@every_kind
def test_weight_decay_is_for_convolutions_and_classifiers_alone(name: str) -> None:
    model = small(name)
    decayed, rest = (group["params"] for group in parameter_groups(model, weight_decay=1e-4, bias_decay=False))
    assert isinstance(decayed, list) and isinstance(rest, list)
    assert {id(p) for p in decayed} == {id(p) for p in trained(model).values() if p.dim() > 1}
    assert {id(p) for p in rest} == {id(p) for p in trained(model).values() if p.dim() == 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception_v3", "mobilenet_v1"])  # test_plan.py counts ResNets
def test_a_training_step_is_counted_on_paper(name: str, tiny_data: Path, tmp_path: Path) -> None:
    """Forward, and backward the same for the weights and, but in the first layer, for the input."""
    side = smallest_side(name)
    config = dataclasses.replace(
        configure(tiny_data, tmp_path / "run"),
        precision="fp16",
        model=ModelConfig(name=name, width=0.125),
        data=DataConfig(image_size=side, val_resize=side),
    )
    found = footprint(config, Shards(num_images=32, batch_size=2, world_size=1, source=""), 5)
    model = small(name)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with FlopCounterMode(display=False) as forward:
        x = first(torch.randn(2, 3, side, side))
        first_layer = 2 * first.weight.numel() * x[:, 0].numel()
        assert forward.get_total_flops() == first_layer
        model(torch.randn(2, 3, side, side))
    whole = forward.get_total_flops() - first_layer
    assert found.flops == 3 * whole - first_layer
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
