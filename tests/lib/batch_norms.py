"""batch_norm_act beside torch's batch norm in float64 and float32: drawn arguments, results by name, the errors compared.

Gradients are held to those with the mask of the output as stored, which is the rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk

# The interpreter truncates to bfloat16 where the GPU rounds to nearest: one whole step instead of half of one.
STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-23}
SHAPES = {2: (2, 1, 1), 49: (1, 7, 7), 98: (2, 7, 7), 2100: (3, 20, 35)}
FORMS = [("none", False), ("relu", False), ("relu6", False), ("none", True), ("relu", True), ("relu6", True)]


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def draw(channels: int, rows: int, dtype: torch.dtype, shift: float = 0.0) -> dict[str, Any]:
    """x, residual and the gradient of y, channels-last; weight, bias and running statistics in float32."""
    generator = torch.Generator().manual_seed(channels + rows)
    images, height, width = SHAPES[rows]
    x, residual, grad = (
        channels_last(torch.randn(images, channels, height, width, generator=generator)) for _ in range(3)
    )
    weight, bias, mean = torch.randn(3, channels, generator=generator).unbind()
    var = torch.rand(channels, generator=generator) + 0.5
    return {
        "x": (1.5 * x + shift).to(dtype), "residual": residual.to(dtype), "grad": grad.to(dtype),
        "weight": 2 * weight, "bias": bias, "running_mean": mean + shift, "running_var": var,
    }  # fmt: skip


def open_mask(y: Tensor, act: str) -> Tensor:
    return (
        torch.ones_like(y, dtype=torch.bool) if act == "none" else (y > 0) & (y < (6 if act == "relu6" else torch.inf))
    )


def by_torch(data: dict[str, Any], dtype: torch.dtype, act: str, training: bool, mask: Tensor) -> dict[str, Tensor]:
    """The results by torch's operators in `dtype`, the gradient through `mask`."""
    d = {name: None if value is None else value.to(dtype, copy=True) for name, value in data.items()}
    leaves = {name: d[name].requires_grad_() for name in ("x", "weight", "bias") if d[name] is not None}
    y = F.batch_norm(d["x"], d["running_mean"], d["running_var"], d["weight"], d["bias"], training, 0.1, 1e-5)
    grads = dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), d["grad"] * mask, retain_graph=True), strict=True)
    )
    y = y if d["residual"] is None else y + d["residual"]
    y = {"none": y, "relu": y.relu(), "relu6": F.relu6(y)}[act].detach()
    found = {"y": y, "grad_residual": None if d["residual"] is None else d["grad"] * mask}
    found |= {f"grad_{name}": grad for name, grad in grads.items()}
    found |= {name: d[name] for name in ("running_mean", "running_var")}
    return {name: value.double() for name, value in found.items() if value is not None}


def ours(data: dict[str, Any], act: str, training: bool, **more: Any) -> dict[str, Tensor]:
    d = {name: None if value is None else value.clone() for name, value in data.items()}
    names = [name for name in ("x", "weight", "bias", "residual") if d[name] is not None]
    leaves = {name: d[name].requires_grad_() for name in names}
    x, grad = (more.pop(name, d[name]) for name in ("x", "grad"))
    y = fk.batch_norm_act(
        x, d["weight"], d["bias"], d["running_mean"], d["running_var"], residual=d["residual"], act=act,
        training=training, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    grads = torch.autograd.grad(y, [x if name == "x" else leaf for name, leaf in leaves.items()], grad)
    for name in names:
        torch.testing.assert_close(d[name], data[name], rtol=0, atol=0, equal_nan=True)
    assert y.dtype == grads[0].dtype == data["x"].dtype
    found = {f"grad_{name}": value for name, value in zip(leaves, grads, strict=True)}
    found |= {"y": y.detach(), "running_mean": d["running_mean"], "running_var": d["running_var"]}
    return {name: value for name, value in found.items() if value is not None}


def check(data: dict[str, Any], act: str, training: bool, step: dict[torch.dtype, float] = STEP) -> None:
    """The largest error of each result is at most that of torch in float32, and a rounding to the result's dtype more."""
    got = ours(data, act, training)
    mask = open_mask(got["y"], act)
    true, theirs = (by_torch(data, dtype, act, training, mask) for dtype in (torch.float64, torch.float32))
    assert set(got) == set(true)
    x = data["x"].double()
    g, axes = (data["grad"].double() * mask).abs(), [0, *range(2, x.dim())]
    deviation = (x - x.mean(axes, keepdim=True)) / x.std(axes, correction=0, keepdim=True)
    var = (
        x.var(axes, correction=0, keepdim=True) if training else data["running_var"].view([1, -1] + [1] * (x.dim() - 2))
    )
    weight = torch.ones(x.shape[1]) if data["weight"] is None else data["weight"]
    scale = weight.view([1, -1] + [1] * (x.dim() - 2)).abs() / (var + 1e-5).sqrt()
    sizes = {"grad_x": (scale * g).max()} | {
        "grad_bias": g.sum(axes).max(),
        "grad_weight": (g * deviation.abs()).sum(axes).max(),
    }
    for name, exact in true.items():
        allowed = (theirs[name] - exact).abs().max() + step[got[name].dtype] * exact.abs().max() + 1e-7
        if name in sizes:  # a sum of terms of both signs: a rounding of the sum of their sizes, or of the largest
            allowed += 2**-24 * sizes[name]
        error = (got[name].double() - exact).abs().max()
        assert error <= allowed, (name, float(error / allowed))
