"""batch_norm_act's operators, and the torch.autograd.Function that an eager call takes past them; both launch the same code.

    batch_norm_act(...) -> y, with `fork` a copy of y, numbers, y's mask in bits where backward needs one and they fill bytes, and
        the running statistics as moved; an empty tensor for each that is not there
    batch_norm_act_backward(...) -> gradients of x, weight, bias and residual; nothing for the last, where it is that of y

The operators change none of their inputs, so that torch.compile may reorder them: the caller copies the running statistics.
No two results share memory, as torch demands of an operator. An eager call's fork is two views of one memory.

Shape suffixes: C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .. import reference
from .._direct import runs_directly
from .._launch import NAMESPACE, runs_triton
from . import _cpu
from ._bits import as_y, empty_bits, fits_bits, packed
from ._launches import Options, launch_backward, launch_forward, writes_residual
from ._layout import empty_pixels, pixel_stride

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
OPTIONS = "str act, bool training, float momentum, float eps"


def fuses(x: Tensor) -> bool:
    """Whether a kernel takes it: channels-last and not empty, on a GPU not float64, on the CPU float32."""
    return x.numel() > 0 and pixel_stride(x) is not None and (runs_triton(x) or _cpu.takes(x))


def forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """As launch_forward, on x's device. On the CPU the mask is y itself, which the next layer keeps anyway."""
    if runs_triton(x):
        return launch_forward(x, *others)
    *arguments, want_mask = others
    y, numbers_4C = _cpu.forward(x, *arguments) if _cpu.takes(x) else plain_forward(x, *arguments)
    return y, y if want_mask else None, numbers_4C


def plain_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """By reference.py: for an operator that is called where fuses() sends nothing."""
    act, training, share, eps = options
    statistics = running_mean, running_var
    if training:
        var_C, mean_C = torch.var_mean(reference.wide(x), [0, *range(2, x.dim())], correction=0)
    else:
        assert running_mean is not None and running_var is not None
        mean_C, var_C = running_mean, running_var
    y = reference.batch_norm_act(
        x,
        weight,
        bias,
        *statistics,
        residual,
        act=act,
        training=training,
        momentum=share if momentum is None else momentum,
        eps=eps,
    )
    assert isinstance(y, Tensor)
    rstd_C = (var_C + eps).rsqrt()
    scale_C = rstd_C if weight is None else rstd_C * weight
    numbers_4C = torch.stack([mean_C, rstd_C, scale_C, torch.zeros_like(scale_C) if bias is None else bias])
    return empty_pixels(x).copy_(y), numbers_4C


def backward(grad: Tensor, second: Tensor | None, x: Tensor, mask: Tensor | None, *others: Any) -> Gradients:
    """As launch_backward, on x's device."""
    if runs_triton(x):
        return launch_backward(grad, second, x, mask, *others)
    if _cpu.takes(x):
        return _cpu.backward(grad, second, x, as_y(mask, x), *others)
    numbers_4C, options, *_, want_residual = others
    weight_C = numbers_4C[2] / numbers_4C[1]
    *grads, grad_residual = plain_gradients(grad, second, x, mask, numbers_4C, weight_C, options)
    return grads[0], grads[1], grads[2], grad_residual if writes_residual(mask, second, want_residual) else None


def keeps_mask(residual: Tensor | None, act: str) -> bool:
    """Whether backward reads y's mask; without a residual it computes y again from x."""
    return residual is not None and act != "none"


# ------------------------------------------------------------------------------------------------------ custom ops


@custom_op(
    f"{NAMESPACE}::batch_norm_act",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    f"Tensor? device_momentum, bool fork, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(x, weight, bias, running_mean, running_var, residual, device_momentum, fork, *options):
    mean, var = (None if s is None else s.clone() for s in (running_mean, running_var))
    wants = keeps_mask(residual, options[0])
    y, mask, numbers = forward(x, weight, bias, mean, var, residual, device_momentum, Options(*options), wants)
    moved = (numbers.new_empty(0) if s is None else s for s in (mean, var))
    bits = numbers.new_empty(0, dtype=torch.uint8)
    if mask is not None and fits_bits(x):  # on every device, so that the operator's fake form need not know it
        bits = mask if mask.dtype == torch.uint8 else packed(y, options[0])
    return y, y.clone() if fork else y.new_empty(0), numbers, bits, *moved


@_forward.register_fake
def _(x, weight, bias, running_mean, running_var, residual, device_momentum, fork, *options):
    numbers = x.new_empty((4, x.shape[1]), dtype=reference.wide_dtype(x.dtype))
    moved = [numbers.new_empty(0) if s is None else torch.empty_like(s) for s in (running_mean, running_var)]
    has_bits = keeps_mask(residual, options[0]) and fits_bits(x)
    bits = empty_bits(x) if has_bits else x.new_empty(0, dtype=torch.uint8)
    return empty_pixels(x), empty_pixels(x) if fork else x.new_empty(0), numbers, bits, *moved


@custom_op(
    f"{NAMESPACE}::batch_norm_act_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? second, Tensor x, Tensor? mask, Tensor numbers, bool want_residual, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad, second, x, mask, numbers, want_residual, *options):
    grads = backward(grad, second, x, mask, numbers, Options(*options), True, True, want_residual)
    return *grads[:3], x.new_empty(0) if grads[3] is None else grads[3]


@_backward.register_fake
def _(grad, second, x, mask, numbers, want_residual, *options):
    grads = [numbers.new_empty(x.shape[1]) for _ in range(2)]
    written = writes_residual(mask, second, want_residual)
    return empty_pixels(x), *grads, empty_pixels(x) if written else x.new_empty(0)


def _save(ctx, inputs, output) -> None:
    x, weight, _, _, _, residual, _, fork, *options = inputs
    ctx.options = Options(*options)
    mask = None
    if keeps_mask(residual, ctx.options.act):
        mask = output[3] if fits_bits(x) else output[0]
    ctx.save_for_backward(x, mask, output[2], weight)
    ctx.mark_non_differentiable(*output[2 if fork else 1 :])
    ctx.set_materialize_grads(False)


def _vjp(ctx, *grads_of_y):
    grad, second = first_of(*grads_of_y[:2])
    if grad is None:
        return (None,) * 12
    needs_x, needs_weight, needs_bias, _, _, needs_residual, *_ = ctx.needs_input_grad
    x, mask, numbers, weight = ctx.saved_tensors
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        grads = _backward(grad, second, x, mask, numbers, needs_residual, *ctx.options)
        grad_residual = grads[3] if writes_residual(mask, second, needs_residual) else grad
    else:
        grads = plain_gradients(grad, second, x, mask, numbers, weight, ctx.options)
        grad_residual = grads[3]
    return (
        grads[0] if needs_x else None,
        grads[1] if needs_weight else None,
        grads[2] if needs_bias else None,
        *(None, None),
        grad_residual if needs_residual else None,
        *(None,) * 6,
    )


_forward.register_autograd(_vjp, setup_context=_save)


def first_of(grad: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a fork's outputs, of which either may be unused."""
    return (second, None) if grad is None else (grad, second)


def plain_gradients(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    numbers_4C: Tensor,
    weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By reference.py, which is differentiable again; the shift in the bias's place gives the mask of the y that was stored."""
    mean_C, rstd_C, _, shift_C = numbers_4C.unbind()
    act, training, _, eps = options
    numbers = weight, shift_C, mean_C, rstd_C
    return reference.batch_norm_act_grad(grad, second, x, as_y(mask, x), *numbers, act=act, training=training, eps=eps)


# -------------------------------------------------------------------------------------------------------- autograd


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, residual, running_mean, running_var, device_momentum, options, fork, records
    ):
        wants = records and keeps_mask(residual, options.act)
        y, mask, numbers_4C = forward(
            x, weight, bias, running_mean, running_var, residual, device_momentum, options, wants
        )
        ctx.options = options
        ctx.save_for_backward(x, mask, numbers_4C, weight)
        ctx.set_materialize_grads(False)
        # Both are views, so that autograd refuses to change either in place: the other would change with it.
        return (y.view_as(y), y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx: Any, *grads_of_y: Tensor | None):
        grad, second = first_of(*(*grads_of_y, None)[:2])
        x, mask, numbers_4C, weight = ctx.saved_tensors  # raises where one was changed in place
        if grad is None:
            return (None,) * 10
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        grads: Gradients
        if torch.is_grad_enabled() or not runs_directly(grad, second):
            grads = plain_gradients(grad, second, x, mask, numbers_4C, weight, ctx.options)
        else:
            wanted = needs_x, needs_weight or needs_bias, needs_residual
            grads = backward(grad, second, x, mask, numbers_4C, ctx.options, *wanted)
        grad_residual = grad if grads[3] is None else grads[3]
        return (
            grads[0] if needs_x else None,
            grads[1] if needs_weight else None,
            grads[2] if needs_bias else None,
            grad_residual if needs_residual else None,
            *(None,) * 6,
        )


def fused(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: Tensor | float,
    *,
    act: str,
    training: bool,
    eps: float,
    fork: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The function by kernels, of arguments that are checked and that fuses() takes."""
    device_momentum = momentum if isinstance(momentum, Tensor) else None
    options = Options(act, training, 0.0 if isinstance(momentum, Tensor) else float(momentum), float(eps))
    running = running_mean, running_var
    if runs_directly(x, weight, bias, *running, residual, device_momentum):
        records = torch.is_grad_enabled()
        return _BatchNormAct.apply(x, weight, bias, residual, *running, device_momentum, options, fork, records)
    y, second, _, _, *moved = _forward(x, weight, bias, *running, residual, device_momentum, fork, *options)
    if training and running_mean is not None and running_var is not None:
        running_mean.copy_(moved[0])
        running_var.copy_(moved[1])
    return (y, second) if fork else y
