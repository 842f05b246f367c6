"""A loss in eager mode: one torch.autograd.Function that launches directly, from forward and from backward.

The operators of _operators.py serve where torch's dispatcher is needed (_direct.py): they launch the same code, so the bits are
the same. So is the derivative of the gradient, which the backward operator has.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from types import new_class
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._direct import runs_directly
from .._launch import runs_triton
from .._transforms import transformed
from ..reference import wide_dtype
from . import _cpu
from ._operators import Loss, Operators, Options, in_one_pass, make_operators, target_grad
from ._options import LABEL_TENSORS, Ignored, Reduction, named, reduce_rows, scale_in_parts

Rows = tuple[Tensor, ...]


def make_losses(loss: Loss) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """The two that a public function calls, arguments checked:

    (rows, options, reduction) -> the reduced loss; (rows, options, reduction, loss_scale) -> that and the scaled gradient.
    """
    operators = make_operators(loss)
    function = _make_function(loss, operators)

    def reduced(rows: Rows, options: Options, reduction: Reduction) -> Tensor:
        options = _without_graph(options)
        if not runs_directly(*rows, *options[0].tensors):
            loss_N, label_weight_N = operators.forward(*rows, *chain.from_iterable(options))
            return reduce_rows(loss_N, reduction, options[0].denominator(reduction, None, label_weight_N))
        target = options[0].target
        if torch.is_grad_enabled() and (rows[0].requires_grad or target.requires_grad):
            return function.apply(rows[0], target, rows[1:], options, reduction)
        return _forward(loss, rows, options, reduction, want_grad=False)[0]

    def loss_and_grad(
        rows: Rows, options: Options, reduction: Reduction, loss_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        _checks.check_loss_scale(loss_scale, rows[0])
        options = _without_graph(options)
        tensors = *rows, *options[0].tensors, loss_scale if isinstance(loss_scale, Tensor) else None
        if runs_directly(*tensors):
            return _loss_and_grad(loss, tuple(row.detach() for row in rows), options, reduction, loss_scale)
        denominator = options[0].denominator(reduction)
        scale = scale_in_parts(loss_scale, denominator, wide_dtype(rows[0].dtype))
        loss_N, grad = operators.loss_and_grad(*rows, *chain.from_iterable(options), *scale)
        return reduce_rows(loss_N, reduction, denominator), grad

    return reduced, loss_and_grad


def _shape_of_losses(logits: Tensor) -> torch.Size:
    return logits.shape[:1] + logits.shape[2:]


def _without_graph(options: Options) -> Options:
    """No gradient flows to lam, nor through the mean's denominator; torch.func's transforms differentiate it."""
    labels, *weights = options
    if labels.lam_N is None or not labels.lam_N.requires_grad or transformed(labels.lam_N):
        return options
    return labels._replace(lam_N=labels.lam_N.detach()), *weights  # type: ignore[return-value]


def _forward(
    loss: Loss, rows: Rows, options: Options, reduction: Reduction, *, want_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | float, Ignored | None]:
    """The reduced loss; the gradient that the CPU keeps for backward; the mean's denominator; ignored labels, if counted."""
    logits, kept, ignored, label_weight_N = rows[0], None, None, None
    if runs_triton(logits):
        if reduction == "mean" and options[0].unequal:
            label_weight_N = logits.new_empty(_shape_of_losses(logits), dtype=torch.float32)
        loss_N = loss.launch(*rows, *options, want_grad=False, label_weight_N=label_weight_N)[0]
    elif logits.is_cpu:
        loss_N, kept, ignored = loss.on_cpu(*rows, *options, want_grad=want_grad)
    else:
        loss_N = loss.values(*rows, **named(*options))
    if reduction == "none":
        return loss_N, kept, 1, ignored
    denominator = options[0].denominator(reduction, ignored, label_weight_N)
    if isinstance(denominator, Tensor) and denominator.dtype != loss_N.dtype:
        denominator = denominator.to(loss_N.dtype)
    value = loss_N.sum()
    return value.div_(denominator) if reduction == "mean" else value, kept, denominator, ignored


def _make_function(loss: Loss, operators: Operators) -> type[torch.autograd.Function]:
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, logits: Tensor, target: Tensor, others: Rows, options: Options, reduction: Reduction
        ) -> Tensor:
            """target: that of the options, where autograd sees it: a dense one may have a gradient."""
            value, kept, denominator, ctx.ignored = _forward(
                loss, (logits, *others), options, reduction, want_grad=ctx.needs_input_grad[0]
            )
            on_device = denominator if isinstance(denominator, Tensor) else None
            labels, *weights = options
            ctx.save_for_backward(kept, on_device, logits, *others, *labels.tensors)
            ctx.numbers = *labels[LABEL_TENSORS:], *chain.from_iterable(weights)
            ctx.denominator = None if on_device is denominator else denominator
            ctx.reduction, ctx.spent = reduction, False
            ctx.set_materialize_grads(False)
            return value

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
            kept, denominator, *tensors = ctx.saved_tensors  # raises where one was changed in place
            if grad is None:
                return None, None, None, None, None
            arguments = *tensors, *ctx.numbers
            if ctx.reduction == "mean":
                grad = grad / (ctx.denominator if denominator is None else denominator)
            of_logits, of_target = ctx.needs_input_grad[:2]
            directly = runs_directly(grad) and not torch.is_grad_enabled()
            if directly and not of_target:  # the usual one, without an operator more
                return launched(ctx, grad, kept, arguments), None, None, None, None
            grad_N = grad if ctx.reduction == "none" else grad.expand(_shape_of_losses(tensors[0]))
            d_logits = d_target = None
            if of_target:
                d_target = target_grad(loss, grad_N, arguments)
            if of_logits and directly:
                d_logits = launched(ctx, grad, kept, arguments)
            elif of_logits:
                kept = tensors[0].new_empty(0) if kept is None else kept
                d_logits = operators.pull(ctx, grad_N, kept, arguments)
            return d_logits, d_target, None, None, None

    def launched(ctx: Any, scale: Tensor, kept: Tensor | None, arguments: tuple[Any, ...]) -> Tensor:
        """The gradient times a number, or one a row."""
        rows, options = loss.split(arguments)
        logits = rows[0]
        if runs_triton(logits):
            return loss.launch(*rows, *options, scale, want_loss=False)[1]
        if kept is None:
            return loss.grad(scale.expand(_shape_of_losses(logits)), *rows, **named(*options))
        # In the memory that forward kept, past its version counter: a second backward computes it again.
        grad_NK = loss.on_cpu(*rows, *options)[1] if ctx.spent else kept.data
        ctx.spent = True
        return _cpu.scale_(grad_NK, scale, options[0], ctx.ignored).to(logits.dtype)

    return new_class(loss.name, (Fused,))  # its name in a profile and in a graph


def _loss_and_grad(
    loss: Loss, rows: Rows, options: Options, reduction: Reduction, loss_scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    logits, labels = rows[0], options[0]
    dtype = wide_dtype(logits.dtype)
    if not logits.is_cpu or runs_triton(logits):
        denominator = labels.denominator(reduction)
        loss_N, grad = in_one_pass(loss, rows, options, *scale_in_parts(loss_scale, denominator, dtype))
        return reduce_rows(loss_N, reduction, denominator), grad
    loss_N, grad, ignored = loss.on_cpu(*rows, *options)
    denominator = labels.denominator(reduction, ignored)
    if labels.ignore_index is not None and reduction == "mean":  # divided by a tensor, as the operator has it
        denominator = torch.as_tensor(denominator, dtype=dtype, device="cpu")
    device_scale, host_scale = scale_in_parts(loss_scale, denominator, dtype)
    scale = host_scale if device_scale is None else (host_scale * device_scale).to(dtype)
    return reduce_rows(loss_N, reduction, denominator), _cpu.scale_(grad, scale, labels, ignored).to(logits.dtype)
