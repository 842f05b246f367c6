"""Conv2d of the networks: nn.Conv2d beside which it is right, where it is used and where torch's is."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fasttricks.config import NETWORKS, ModelConfig
from fasttricks.models import build_model
from fasttricks.models.convolution import OF_CONV2D, Conv2d, Conv2dPool, convolution_arithmetic
from fasttricks_kernels.convolution import pointwise, winograd
from lib.networks import error_beside


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("winograd.c is for AVX2 and AVX-512")


def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits and all gradients of a training step, in float64, by name."""
    logits, weights = model(images), dict(model.named_parameters())
    gradients = torch.autograd.grad(logits.square().mean(), list(weights.values()))
    found = {"logits": logits, **dict(zip(weights, gradients, strict=True))}
    return {name: value.detach().double() for name, value in found.items()}


@pytest.mark.parametrize(
    ("config", "shape", "count_3x3", "count_1x1"),
    [
        # two of the first stage, one of the second; the others are narrow, small or strided
        (ModelConfig(name="resnet10d", width=0.5, stem_stride=2), (32, 3, 32, 32), 3, 0),
        # four of the second stage, seven of the third, three of the last
        (ModelConfig(name="resnet50d", width=0.5), (8, 3, 128, 128), 6, 14),
    ],
    ids=["resnet10d", "resnet50d"],
)
def test_a_networks_step_is_as_right_as_torchs(
    config: ModelConfig, shape: tuple[int, ...], count_3x3: int, count_1x1: int
) -> None:
    torch.manual_seed(0)
    model = build_model(config, 10).to(memory_format=torch.channels_last)
    images = torch.randn(shape).to(memory_format=torch.channels_last)
    right = step(copy.deepcopy(model).double(), images.double())
    with (
        mock.patch.object(winograd, "conv3x3", side_effect=winograd.conv3x3) as counted,
        mock.patch.object(pointwise, "conv1x1", side_effect=pointwise.conv1x1) as products,
    ):
        ours = step(copy.deepcopy(model), images)
    assert (counted.call_count, products.call_count) == (count_3x3, count_1x1)
    with (
        mock.patch.object(winograd, "takes", return_value=False),
        mock.patch.object(pointwise, "takes", return_value=False),
    ):
        theirs = step(model, images)
    assert error_beside(ours, theirs, right) <= 1.3


@pytest.mark.parametrize("name", NETWORKS)
def test_a_runs_fingerprint_knows_the_networks_that_have_it(name: str) -> None:
    """Else a run on one of them would be resumed with other last bits in silence."""
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), 3)
    assert any(isinstance(layer, Conv2d) for layer in model.modules()) == (NETWORKS[name].family in OF_CONV2D)


OTHER: dict[str, dict[str, Any]] = {
    "1x1 of few channels": {"kernel_size": 1},
    "no padding": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilation": {"kernel_size": 3, "padding": 1, "dilation": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "bias": {"kernel_size": 3, "padding": 1, "bias": True},
    "reflection": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "a padding by name": {"kernel_size": 3, "padding": "same"},
    "1x1, stride": {"kernel_size": 1, "stride": 2, "in_channels": 256},
    "1x1, padding": {"kernel_size": 1, "padding": 1, "in_channels": 256},
    "1x1, groups": {"kernel_size": 1, "groups": 2, "in_channels": 256},
    "1x1, bias": {"kernel_size": 1, "bias": True, "in_channels": 256},
}


@pytest.mark.parametrize("kind", list(OTHER))
def test_other_convolutions_are_torchs(kind: str) -> None:
    torch.manual_seed(0)
    options = {"in_channels": 64, "out_channels": 64, "bias": False, **OTHER[kind]}
    layers = [made(**options) for made in (Conv2d, Conv2dPool, nn.Conv2d)]
    for layer in layers[:2]:
        layer.load_state_dict(layers[2].state_dict())
    x = torch.randn(2, options["in_channels"], 32, 32).to(memory_format=torch.channels_last)
    assert winograd.takes(x, torch.empty(64, x.shape[1], 3, 3))
    assert pointwise.takes(x, torch.empty(64, x.shape[1], 1, 1)) == (options["in_channels"] == 256)
    with mock.patch.object(pointwise, "conv1x1", None), mock.patch.object(winograd, "conv3x3", None):
        ours, pooled, theirs = (layer(x) for layer in layers)
    assert torch.equal(ours, theirs) and torch.equal(pooled, nn.functional.max_pool2d(theirs, 2))


@pytest.mark.parametrize(
    ("made", "sides", "module", "function"),
    [
        (Conv2d, (64, 3, 1), winograd, "conv3x3"),
        (Conv2dPool, (64, 3, 1), winograd, "conv3x3_pool"),
        (Conv2d, (256, 1, 0), pointwise, "conv1x1"),
    ],
)
def test_it_has_torchs_place_in_other_uses(
    made: type[Conv2d], sides: tuple[int, int, int], module: Any, function: str
) -> None:
    channels, kernel, padding = sides
    layer = made(channels, channels, kernel, padding=padding, bias=False)
    x = torch.randn(2, channels, 32, 32).to(memory_format=torch.channels_last)
    with mock.patch.object(module, function, side_effect=getattr(module, function)) as counted:
        layer(x)
    counted.assert_called_once()
    with mock.patch.object(module, function) as never:
        assert "conv2d" in str(torch.export.export(nn.Sequential(layer), (x,)).graph)
        any_number = {"input": {0: torch.export.Dim("N", min=1)}}
        few = x[:, :, :8, :8].contiguous(memory_format=torch.channels_last)
        torch.export.export(layer, (few,), dynamic_shapes=any_number)  # raises where a size became a rule
        traced = torch.fx.symbolic_trace(nn.Sequential(layer))
        wanted = torch.func.functional_call(layer, {"weight": layer.weight.double()}, x.double())
    never.assert_not_called()
    torch.testing.assert_close(traced(x).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_without_a_compiler_all_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the run's fingerprint then says."""
    monkeypatch.setattr(winograd, "compiled", lambda: None)
    x = torch.randn(2, 256, 32, 32).to(memory_format=torch.channels_last)
    assert convolution_arithmetic() == "torch" and pointwise.takes(x, torch.empty(256, 256, 1, 1))
    for kernel in (1, 3):
        layer = Conv2d(256, 256, kernel, padding=kernel // 2, bias=False)
        assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, padding=kernel // 2))
