"""The checks that the CPU's own convolutions share: errors beside torch's, layouts, derivatives, the calls left to torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

Wanted = tuple[Tensor, ...]
Convolution = Callable[[Tensor, Tensor], Tensor]


def skip_unless_measured() -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the project's convolutions are for AVX2 and AVX-512")


def draw(channels: int, outputs: int, side: tuple[int, int], images: int = 3, kernel: int = 3) -> dict[str, Tensor]:
    """x, weight and the gradient of y; x and the gradient channels-last."""
    torch.manual_seed(0)
    x, grad = (torch.randn(images, n, *side).to(memory_format=torch.channels_last) for n in (channels, outputs))
    weight = torch.randn(outputs, channels, kernel, kernel) / (kernel**2 * channels) ** 0.5
    return {"x": x, "weight": weight, "grad": grad}


def passes(convolution: Convolution, data: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Wanted:
    """y, and the gradients of x and weight, in float64."""
    x, weight, grad = (value.detach().to(dtype) for value in data.values())
    leaves = x.requires_grad_(), weight.requires_grad_()
    y = convolution(*leaves)
    grad = grad[..., : y.shape[2], : y.shape[3]]
    return tuple(value.detach().double() for value in (y, *torch.autograd.grad(y, leaves, grad)))


def check_errors(ours_is: Convolution, theirs_is: Convolution, data: dict[str, Tensor], factor: float) -> None:
    """The root mean square error of each pass beside float64 is at most torch's times `factor`, and a rounding."""
    exact = passes(theirs_is, data, torch.float64)
    for ours, theirs, right in zip(passes(ours_is, data), passes(theirs_is, data), exact, strict=True):
        assert ours.shape == right.shape
        step = torch.finfo(torch.float32).eps * right.square().mean().sqrt()
        bound = factor * (theirs - right).square().mean().sqrt() + step
        assert (ours - right).square().mean().sqrt() <= bound


def check_layouts(ours: Convolution, data: dict[str, Tensor]) -> None:
    """Results are channels-last, also from a gradient of another layout; inputs are left; a second call has the same bits."""
    before = {name: value.clone() for name, value in data.items()}
    x, weight = data["x"].requires_grad_(), data["weight"].requires_grad_()
    y = ours(x, weight)
    grad = data["grad"][..., : y.shape[2], : y.shape[3]]
    grads = torch.autograd.grad(y, (x, weight), grad.contiguous())
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in (y, *grads))
    assert all(torch.equal(value, before[name]) for name, value in data.items())
    (again,) = torch.autograd.grad(ours(x, weight), x, grad)
    assert torch.equal(again, grads[0])


def check_second_derivative(ours: Convolution, theirs: Convolution, data: dict[str, Tensor]) -> None:
    def twice(convolution: Convolution) -> Wanted:
        x, weight = data["x"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
        grads = torch.autograd.grad(convolution(x, weight).pow(2).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(grad.pow(2).mean() for grad in grads), (x, weight))

    for found, wanted in zip(twice(ours), twice(theirs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def check_that_a_change_is_refused(ours: Convolution, data: dict[str, Tensor]) -> None:
    """Of an input between forward and backward."""
    x = data["x"].requires_grad_() * 1
    y = ours(x, data["weight"].requires_grad_())
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def calls_left_to_torch(x: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of x and weight that are taken: other dtypes, layouts, devices and numbers of dimensions, no images, fewer values."""
    fewer = x[..., 1:, 1:].to(memory_format=torch.channels_last)
    return {
        "float64": (x.double(), weight.double()),
        "bfloat16": (x.bfloat16(), weight.bfloat16()),
        "NCHW": (x.contiguous(), weight),
        "few values": (fewer, weight),
        "other channels": (x, weight[:, ::2]),
        "no images": (x[:0], weight),
        "three dimensions": (x[0], weight),
        "meta": (x.to("meta"), weight.to("meta")),
    }


def check_what_is_left_to_torch(takes: Callable[[Tensor, Tensor], bool], x: Tensor, weight: Tensor) -> None:
    """Transforms, autocast and modes; `takes` takes x and weight else."""
    seen = []

    def ask(x: Tensor) -> Tensor:
        seen.append(takes(x, weight))
        return x.sum()

    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x[None])
    with torch.autocast("cpu", torch.bfloat16):
        ask(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ask(mode.from_tensor(x))
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    torch.compile(ask, backend="eager")(x)
    assert seen and not any(seen)
    ask(x)
    assert seen[-1]
