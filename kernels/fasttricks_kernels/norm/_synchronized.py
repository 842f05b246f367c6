"""batch_norm_act over the values of all ranks: between the passes each gathers the others' sums, and adds them in rank order.

All ranks therefore have the same bits. A rank's total is its mean, sum of squared distances from it and number of values: of
the Triton kernels (3 C + 1) float32, with the mean's rest beyond its rounding; else (2 C + 1) float64. In backward it is the
sums of g and g (x - mean), (2 C).

Shape suffixes: C channels; W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from .._launch import runs_triton
from . import _cpu
from ._launches import (
    Options,
    launch_gradient,
    launch_gradient_sums,
    launch_merge_gradients,
    launch_merge_statistics,
    launch_normalise,
    launch_statistics,
    writes_residual,
)
from ._layout import as_pixels, empty_pixels, num_pixels
from ._operators import first_of, keeps_mask

Pair = tuple[Tensor | None, Tensor | None]


def gathered(total: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(W, ...) of all ranks, in their order."""
    totals = total.new_empty((dist.get_world_size(group), total.numel()))
    dist.all_gather(list(totals.unbind()), total, group=group)
    return totals


# ---------------------------------------------------------------------------------------------------------- forward


def numbers_of_all(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Pair,
    momentum: Tensor | None,
    options: Options,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Numbers (4, C), as launch_forward has them, and the count of all values, (). Moves the running statistics."""
    num_channels, dtype = x.shape[1], reference.wide_dtype(x.dtype)
    numbers_4C = x.new_empty((4, num_channels), dtype=dtype)
    if runs_triton(x):
        total = x.new_zeros(3 * num_channels + 1, dtype=dtype)
        if x.numel():
            none = (None,) * 6
            launch_merge_statistics(x, launch_statistics(x), *none, total, None, options)
        count = x.new_empty((), dtype=dtype)
        others = *running, momentum, weight, bias, numbers_4C, None, count
        launch_merge_statistics(x, gathered(total, group), *others, options)
        return numbers_4C, count
    totals_2C = x.new_zeros((2, num_channels), dtype=torch.float64)
    if x.numel() and _cpu.takes(x):
        totals_2C = _cpu.call("statistics", x, {}, options)
    elif x.numel():
        var_C, mean_C = torch.var_mean(reference.wide(x), [0, *range(2, x.dim())], correction=0)
        totals_2C.copy_(torch.stack([mean_C, var_C * num_pixels(x)]))
    totals = gathered(torch.cat([totals_2C.flatten(), totals_2C.new_tensor([num_pixels(x)])]), group)
    means_WC, squares_WC, counts_W1 = totals.split([num_channels, num_channels, 1], 1)
    count = counts_W1.sum()
    if x.is_cpu and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    mean_C = (counts_W1 * means_WC).sum(0) / count
    square_C = (squares_WC + counts_W1 * (means_WC - mean_C) ** 2).sum(0)
    share = options.momentum if momentum is None else momentum.double()
    for statistic, of_batch in zip(running, (mean_C, square_C / (count - 1)), strict=True):
        if statistic is not None:
            moved = (1 - share) * statistic + share * of_batch
            statistic.copy_(torch.where(count > 0, moved, statistic))
    rounded_C, rstd_C = mean_C.to(dtype), (square_C / count + options.eps).rsqrt().to(dtype)
    scale_C = rstd_C if weight is None else weight * rstd_C
    shift_C = (rounded_C - mean_C) * scale_C + (0.0 if bias is None else bias)
    return torch.stack([rounded_C, rstd_C, scale_C, shift_C.to(dtype)]), count


def normalise(
    x: Tensor, residual: Tensor | None, numbers_4C: Tensor, options: Options, want_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """As launch_normalise."""
    if x.numel() and runs_triton(x):
        return launch_normalise(x, residual, numbers_4C, options.act, want_mask)
    y = plain_normalise(x, residual, numbers_4C, options)
    return y, y if want_mask else None


def plain_normalise(x: Tensor, residual: Tensor | None, numbers_4C: Tensor, options: Options) -> Tensor:
    """y, without Triton."""
    if not x.numel():
        return torch.empty_like(x)
    if _cpu.takes(x):
        y, residual = empty_pixels(x), None if residual is None else as_pixels(residual)
        _cpu.call("normalise", x, {"residual": residual, "numbers": numbers_4C, "out": y}, options)
        return y
    mean, _, scale, shift = spread(numbers_4C, x)
    y = (reference.wide(x) - mean) * scale + shift
    y = y if residual is None else y + reference.wide(residual)
    return reference.activation(y, options.act).to(x.dtype)


def spread(numbers_kC: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Rows of numbers a channel, each in a shape that goes with x."""
    return tuple(row.view([1, -1] + [1] * (x.dim() - 2)) for row in numbers_kC)


# --------------------------------------------------------------------------------------------------------- backward


def sums(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    numbers_4C: Tensor,
    options: Options,
    written: bool,
) -> tuple[Tensor, Pair, Tensor | None]:
    """This rank's total; gradients of weight and bias; and the masked sum of grad and second, if it is to be written."""
    num_channels, triton = x.shape[1], runs_triton(x)
    total_2C = x.new_zeros((2, num_channels), dtype=numbers_4C.dtype if triton else torch.float64)
    if not x.numel():
        zeros = x.new_zeros((2, num_channels), dtype=numbers_4C.dtype)
        return total_2C, (zeros[0], zeros[1]), torch.empty_like(x) if written else None
    if triton or _cpu.takes(x):
        grad, second = as_pixels(grad), None if second is None else as_pixels(second)
        grad_residual = empty_pixels(x) if written else None
        if triton:
            parts = launch_gradient_sums(grad, second, x, mask, numbers_4C, grad_residual, options.act)
            of_numbers = launch_merge_gradients(x, parts, numbers_4C, total_2C, None, None, True)
            return total_2C, of_numbers, grad_residual
        of_numbers = x.new_empty(num_channels), x.new_empty(num_channels)
        tensors = {
            "grad": grad, "second": second, "y": mask, "numbers": numbers_4C, "grad_residual": grad_residual,
            "grad_weight": of_numbers[0], "grad_bias": of_numbers[1],
        }  # fmt: skip
        return _cpu.call("sums", x, tensors, options), of_numbers, grad_residual
    g = masked(grad, second, x, mask, numbers_4C, options)
    grad_residual = g.to(x.dtype) if written else None
    g = g if grad_residual is None else reference.wide(grad_residual)  # as gradient() reads it
    mean, *_ = spread(numbers_4C, x)
    axes = [0, *range(2, x.dim())]
    sum_C, product_C = g.sum(axes), (g * (reference.wide(x) - mean)).sum(axes)
    total_2C.copy_(torch.stack([sum_C, product_C]))
    return total_2C, (product_C * numbers_4C[1], sum_C), grad_residual


def masked(
    grad: Tensor, second: Tensor | None, x: Tensor, y: Tensor | None, numbers_4C: Tensor, options: Options
) -> Tensor:
    """The sum of the gradients where the activation was open, by plain PyTorch."""
    g = reference.wide(grad) if second is None else reference.wide(grad) + reference.wide(second)
    if options.act == "none":
        return g
    y = plain_normalise(x, None, numbers_4C, options) if y is None else y
    return g.masked_fill(reference.shut(y, options.act), 0.0)


def gradient(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    numbers_4C: Tensor,
    totals: Tensor,
    count: Tensor,
    grad_residual: Tensor | None,
    options: Options,
) -> Tensor:
    """The gradient of x by the ranks' totals (W, 2 C); of an empty x too, for which there is nothing to do."""
    if not x.numel():
        return torch.empty_like(x)
    if runs_triton(x):
        means_2C = x.new_empty((2, x.shape[1]), dtype=torch.float32)
        launch_merge_gradients(x, totals, numbers_4C, None, means_2C, count, False)
        return launch_gradient(grad, second, x, numbers_4C, means_2C, grad_residual, options.act)
    rstd_C = numbers_4C[1].double()
    sum_C, product_C = totals.sum(0).view(2, -1)
    means_2C = (torch.stack([sum_C, product_C * rstd_C * rstd_C]) / count).to(numbers_4C.dtype)
    if _cpu.takes(x):
        out, grad, second = empty_pixels(x), as_pixels(grad), None if second is None else as_pixels(second)
        tensors = {
            "grad": grad, "second": second, "numbers": numbers_4C, "grad_residual": grad_residual, "means": means_2C,
            "out": out,
        }  # fmt: skip
        _cpu.call("gradient", x, tensors, options)
        return out
    g = masked(grad, second, x, None, numbers_4C, options) if grad_residual is None else reference.wide(grad_residual)
    mean, _, scale, _ = spread(numbers_4C, x)
    mean_g, slope = spread(means_2C, x)
    return (scale * (g - mean_g - (reference.wide(x) - mean) * slope)).to(x.dtype)


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, residual, running_mean, running_var, device_momentum, options, fork, records, group
    ):
        x = as_pixels(x) if runs_triton(x) or _cpu.takes(x) else x
        running = running_mean, running_var
        numbers_4C, count = numbers_of_all(x, weight, bias, running, device_momentum, options, group)
        y, mask = normalise(x, residual, numbers_4C, options, records and keeps_mask(residual, options.act))
        ctx.options, ctx.group = options, group
        ctx.save_for_backward(x, mask, numbers_4C, count)
        ctx.set_materialize_grads(False)
        return (y.view_as(y), y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx: Any, *grads_of_y: Tensor | None):
        grad, second = first_of(*(*grads_of_y, None)[:2])
        x, mask, numbers_4C, count = ctx.saved_tensors  # raises where one was changed in place
        if grad is None:
            return (None,) * 11
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "batch_norm_act with a process_group has no second derivative (create_graph=True); "
                "without process_group, in one process, it has"
            )
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        written = writes_residual(mask, second, needs_residual)
        total_2C, of_numbers, grad_residual = sums(grad, second, x, mask, numbers_4C, ctx.options, written)
        grad_x = None
        if needs_x:
            totals = gathered(total_2C.flatten(), ctx.group)
            grad_x = gradient(grad, second, x, numbers_4C, totals, count, grad_residual, ctx.options)
        of_residual = grad if grad_residual is None else grad_residual
        return (
            grad_x,
            of_numbers[0] if needs_weight else None,
            of_numbers[1] if needs_bias else None,
            of_residual if needs_residual else None,
            *(None,) * 7,
        )


def synchronized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: Tensor | float,
    group: dist.ProcessGroup,
    *,
    act: str,
    eps: float,
    fork: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The function in training over all of `group`, of arguments that are checked."""
    device_momentum = momentum if isinstance(momentum, Tensor) else None
    options = Options(act, True, 0.0 if isinstance(momentum, Tensor) else float(momentum), float(eps))
    tensors = x, weight, bias, residual, running_mean, running_var, device_momentum
    return _Synchronized.apply(*tensors, options, fork, torch.is_grad_enabled(), group)
