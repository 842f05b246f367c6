"""MaxPool: torch's values and gradients, of the second order too, without torch's hold on the input."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from fasttricks.models.pool import MaxPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("window", [(3, 2, 1), (3, 2, 0)])
def test_values_and_gradients_are_torchs(
    window: tuple[int, int, int], format: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 9, 11).relu().to(dtype).to(memory_format=format)  # with many equal zeros
    results = []
    for pool in (MaxPool(*window), nn.MaxPool2d(*window)):
        leaf = x.detach().clone().requires_grad_()
        y = pool(leaf)
        (grad,) = torch.autograd.grad(y, leaf, torch.sin(y.double()).to(dtype) + 1)
        results.append((y.detach(), grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_it_is_differentiable_twice() -> None:
    x = torch.randperm(2 * 2 * 6 * 6).double().view(2, 2, 6, 6).requires_grad_()  # no two alike
    assert torch.autograd.gradcheck(MaxPool(3, 2, 1), (x,), eps=1e-3)
    assert torch.autograd.gradgradcheck(lambda x: MaxPool(3, 2, 1)(x) ** 2 / 100, (x,), eps=1e-3)


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_the_input_is_let_go(kind: str) -> None:
    pool = MaxPool(3, 2, 1) if kind == "ours" else nn.MaxPool2d(3, 2, 1)
    leaf = torch.randn(1, 2, 8, 8, requires_grad=True)
    x = leaf * 2
    storage = weakref.ref(x.untyped_storage())
    y = pool(x)
    del x
    assert (storage() is None) == (kind == "ours")
    y.sum().backward()
    assert leaf.grad is not None


def test_it_has_torchs_place_in_other_uses() -> None:
    x = torch.randn(1, 2, 8, 8)
    pool = MaxPool(3, 2, 1)
    wanted = nn.MaxPool2d(3, 2, 1)(x)

    def twice(x: Tensor) -> Tensor:
        return pool(x).square().sum()

    assert torch.equal(pool(x), wanted) and torch.equal(torch.fx.symbolic_trace(pool)(x), wanted)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(twice(leaf), leaf)
    assert torch.equal(torch.func.grad(twice)(x), grad)
    assert "max_pool2d" in str(torch.export.export(nn.Sequential(pool), (x,)).graph)
    assert copy.deepcopy(pool)(x).equal(wanted)
