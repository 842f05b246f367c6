"""batch_norm_act beside torch's batch norm in float64 and float32: drawn arguments, results by name, the errors compared.

Gradients are held to those with the mask of the output as stored, which is the rule. In a fork with a residual they are held to
those of the sum as stored, which is the residual's gradient; it is held to the sum in float64.
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


def draw(channels: int, rows: int, dtype: torch.dtype, shift: float = 0.0, fork: bool = False) -> dict[str, Any]:
    """x, residual and the gradient of y, channels-last; weight, bias and running statistics in float32.

    With `fork` a second gradient, of the second output.
    """
    generator = torch.Generator().manual_seed(channels + rows)
    images, height, width = SHAPES[rows]
    x, residual, grad = (
        channels_last(torch.randn(images, channels, height, width, generator=generator)) for _ in range(3)
    )
    weight, bias, mean = torch.randn(3, channels, generator=generator).unbind()
    var = torch.rand(channels, generator=generator) + 0.5
    data = {
        "x": (1.5 * x + shift).to(dtype), "residual": residual.to(dtype), "grad": grad.to(dtype),
        "weight": 2 * weight, "bias": bias, "running_mean": mean + shift, "running_var": var,
    }  # fmt: skip
    second = channels_last(torch.randn(x.shape, generator=generator)).to(dtype)
    return data | {"second": second} if fork else data


def gradient(data: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The gradient of y; of a fork the sum of both, rounded to their dtype as autograd has it, or in float64."""
    if "second" not in data:
        return data["grad"].to(dtype)
    grads = [data["grad"], data["second"]]
    return (grads[0] + grads[1]).to(dtype) if dtype != torch.float64 else grads[0].double() + grads[1].double()


def open_mask(y: Tensor, act: str) -> Tensor:
    return (
        torch.ones_like(y, dtype=torch.bool) if act == "none" else (y > 0) & (y < (6 if act == "relu6" else torch.inf))
    )


def by_torch(data: dict[str, Any], dtype: torch.dtype, act: str, training: bool, mask: Tensor) -> dict[str, Tensor]:
    """The results by torch's operators in `dtype`, the gradient through `mask`."""
    d = {name: None if value is None else value.to(dtype, copy=True) for name, value in data.items()}
    grad = gradient(data, dtype) * mask
    leaves = {name: d[name].requires_grad_() for name in ("x", "weight", "bias") if d[name] is not None}
    y = F.batch_norm(d["x"], d["running_mean"], d["running_var"], d["weight"], d["bias"], training, 0.1, 1e-5)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True), strict=True))
    y = y if d["residual"] is None else y + d["residual"]
    y = {"none": y, "relu": y.relu(), "relu6": F.relu6(y)}[act].detach()
    found = {"y": y, "grad_residual": None if d["residual"] is None else grad}
    found |= {f"grad_{name}": grad for name, grad in grads.items()}
    found |= {name: d[name] for name in ("running_mean", "running_var")}
    return {name: value.double() for name, value in found.items() if value is not None}


def ours(data: dict[str, Any], act: str, training: bool, **more: Any) -> dict[str, Tensor]:
    d = {name: None if value is None else value.clone() for name, value in data.items()}
    names = [name for name in ("x", "weight", "bias", "residual") if d[name] is not None]
    leaves = {name: d[name].requires_grad_() for name in names}
    group = {"process_group": more.pop("process_group")} if "process_group" in more else {}
    d |= more
    x, fork = d["x"], "second" in d
    y = fk.batch_norm_act(
        x, d["weight"], d["bias"], d["running_mean"], d["running_var"], residual=d["residual"], act=act,
        training=training, momentum=0.1, eps=1e-5, fork=fork, **group,
    )  # fmt: skip
    outputs, grads_of_y = (y, [d["grad"], d["second"]]) if fork else ((y,), [d["grad"]])
    inputs = [x if name == "x" else leaf for name, leaf in leaves.items()]
    grads = torch.autograd.grad(outputs, inputs, grads_of_y)
    y = outputs[-1]
    for name in names:
        torch.testing.assert_close(d[name], data[name], rtol=0, atol=0, equal_nan=True)
    assert y.dtype == grads[0].dtype == data["x"].dtype
    found = {f"grad_{name}": value for name, value in zip(leaves, grads, strict=True)}
    found |= {"y": y.detach(), "running_mean": d["running_mean"], "running_var": d["running_var"]}
    return {name: value for name, value in found.items() if value is not None}


def terms(data: dict[str, Any], training: bool, mask: Tensor) -> dict[str, Tensor]:
    """Sizes of the terms whose sum, of both signs, a result is: what float32 rounds."""
    x = data["x"].double()
    g, axes = (gradient(data, torch.float64) * mask).abs(), [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    if training:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    else:
        var, mean = (data[name].double().view(shape) for name in ("running_var", "running_mean"))
    deviation = (x - mean) / (var + 1e-5).sqrt()
    weight = torch.ones(x.shape[1]) if data["weight"] is None else data["weight"]
    scale = weight.view(shape).abs() / (var + 1e-5).sqrt()
    products = g * deviation.abs()
    terms_of_y = scale * (x - mean).abs() + sum(
        0.0 if data[name] is None else data[name].double().abs().view(shape if name == "bias" else x.shape)
        for name in ("bias", "residual")
    )
    terms_of_grad = g + (g.mean(axes, keepdim=True) + deviation.abs() * products.mean(axes, keepdim=True)) * training
    return {
        "y": terms_of_y,
        "grad_x": scale * terms_of_grad,
        "grad_bias": g.sum(axes),
        "grad_weight": products.sum(axes),
    }


def check(
    data: dict[str, Any],
    act: str,
    training: bool,
    step: dict[torch.dtype, float] = STEP,
    got: dict[str, Tensor] | None = None,
) -> None:
    """The largest error of each result is at most that of torch in float32, and a rounding to the result's dtype more.

    `got`: the results, where they are not of ours().
    """
    got = ours(data, act, training) if got is None else got
    mask = open_mask(got["y"], act)
    if "second" in data and data["residual"] is not None:
        sum_ = gradient(data, torch.float64) * mask
        size = step[data["grad"].dtype] if data["grad"].dtype != torch.float32 else 2**-24
        assert ((got["grad_residual"].double() - sum_).abs() <= size * sum_.abs()).all()
        data = {name: value for name, value in data.items() if name != "second"} | {"grad": got["grad_residual"]}
    true, theirs = (by_torch(data, dtype, act, training, mask) for dtype in (torch.float64, torch.float32))
    assert set(got) == set(true)
    sizes = terms(data, training, mask)
    for name, exact in true.items():
        allowed = (theirs[name] - exact).abs().max() + step[got[name].dtype] * exact.abs().max() + 1e-7
        if (
            name in sizes
        ):  # a sum of terms of both signs: two roundings of their sizes, for a draw may spare torch its own
            allowed += 2**-23 * sizes[name].max()
        error = (got[name].double() - exact).abs().max()
        assert error <= allowed, (name, float(error / allowed))


def check_many(draws: int) -> None:
    """Over many draws the root mean square of each result's error is at most 1.25 of torch's in float32, or of a rounding's.

    The largest error of one draw depends on the draw, so check() leaves it room. These figures hardly do.
    """
    for shape in [(6, 8), (5, 8, 1, 1), (6, 8, 5), (2, 8, 7, 7)]:
        squares: dict[str, list[Tensor]] = {}
        for _ in range(draws):
            data = draw(8, 2, torch.float32)
            data |= {name: channels_last(torch.randn(shape)) for name in ("x", "residual", "grad")}
            got = ours(data, "relu", True)
            mask = open_mask(got["y"], "relu")
            true, theirs = (by_torch(data, dtype, "relu", True, mask) for dtype in (torch.float64, torch.float32))
            sizes = terms(data, True, mask)
            for name, exact in true.items():
                found = [(value[name] - exact).square().mean() for value in (got, theirs)]
                squares.setdefault(name, []).append(torch.stack([*found, sizes.get(name, exact).square().mean()]))
        for name, found in squares.items():
            error, its, size = torch.stack(found).mean(0).sqrt().tolist()
            assert error <= 1.25 * max(its, 2**-24 * size), (shape, name, error, its, size)
