"""The operators of a loss, by one maker: their devices, fakes and gradients are the same for every loss.

    name(rows, options) -> losses, kept, label_weight
    name_backward(grad_loss, kept, rows, options) -> gradient of the logits
    name_loss_and_grad(rows, options, SCALE) -> losses, gradient of the logits

`rows` are (N, K) tensors: the logits and, where a loss distils, the teacher's. Cross-entropy also takes (N, K, P) logits, of
(N, P) labels and losses. `options` are LABELS and, there, WEIGHTS.
`kept` is for backward: on the CPU the gradient of the losses' sum; empty where Triton runs, which computes it again, and for
float64 on a GPU, which reference.py serves. `label_weight` is a float32 one a loss where Triton runs and labels are `unequal`,
else empty. The logits have a gradient, and a dense target, by reference.py.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from .. import _checks, reference
from .._launch import NAMESPACE, runs_triton
from .._transforms import differentiated, is_batched, transformed, untransformed
from . import _cpu
from ._options import LABEL_TENSORS, SCALE, Labels, Weights, named, scale_of_rows

Options = tuple[Labels] | tuple[Labels, Weights]


@dataclass(frozen=True)
class Loss:
    """The parts that differ between losses."""

    name: str
    rows: tuple[str, ...]
    """Their names in a schema, the logits first."""
    options: str
    """Their schema."""
    launch: Callable[..., tuple[Any, Any]]
    """The kernel: (*rows, *options, *SCALE) -> losses, scaled gradient; want_loss or want_grad=False leaves one out.

    It writes to label_weight_N, where given.
    """
    on_cpu: Callable[..., _cpu.Result]
    """(*rows, *options) -> losses, gradient of their sum in their dtype, counts; want_grad=False leaves the gradient out."""
    values: Callable[..., Tensor]
    """reference.py's losses: (*rows, **named(*options))."""
    grad: Callable[..., Tensor]
    """Its gradient: (scale_N, *rows, **named(*options))."""
    grad_vjp: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    """The gradient of that, of scale_N, logits and dense target: (v_NK, scale_N, *rows, **named(*options))."""

    @property
    def arguments(self) -> str:
        """Schema of rows and options."""
        return ", ".join([*(f"Tensor {row}" for row in self.rows), self.options])

    def split(self, arguments: Sequence[Any]) -> tuple[Sequence[Tensor], Options]:
        """Rows and options, which an operator takes by position."""
        first = len(self.rows)
        last = first + len(Labels._fields)
        labels, weights = Labels(*arguments[first:last]), arguments[last:]
        return arguments[:first], (labels, Weights(*weights)) if weights else (labels,)


class Operators(NamedTuple):
    """For _eager.py, where it does not launch itself."""

    forward: Callable[..., tuple[Tensor, Tensor | None]]
    """Losses and the rows' label weights, where a kernel has written them."""
    loss_and_grad: Callable[..., tuple[Tensor, Tensor]]
    pull: Callable[..., Tensor]
    """The gradient of the logits, differentiable itself: (ctx, grad_loss_N, kept, arguments)."""


def make_operators(loss: Loss) -> Operators:
    """Registers all three, once a process. Where torch.func transforms the call, plain PyTorch takes the operator's place."""
    forward, backward = _make_forward(loss), _make_backward(loss)
    pull = _make_pull(loss, backward)
    _differentiate_forward(loss, forward, pull)
    _differentiate_backward(loss, backward)
    loss_and_grad = _make_loss_and_grad(loss)

    def either_forward(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        if transformed(*arguments):
            return _plain_losses(loss, arguments), None
        losses, _, label_weight = forward(*arguments)
        written = runs_triton(arguments[0]) and loss.split(arguments)[1][0].unequal
        return losses, label_weight if written else None

    def either_loss_and_grad(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        if transformed(logits, *others):
            return _plain_loss_and_grad(loss, (logits, *others))
        return loss_and_grad(logits.detach(), *others)

    return Operators(either_forward, either_loss_and_grad, pull)


# ------------------------------------------------------------------------------------------------------ torch.func


def _plain_losses(loss: Loss, arguments: Sequence[Any]) -> Tensor:
    """forward in plain PyTorch, which every transform sees through: as reference.py has it, labels and lam checked on the CPU."""
    rows, options = loss.split(arguments)
    labels = options[0]
    if rows[0].is_cpu and not torch.compiler.is_compiling():
        for name, label_N in (("target", labels.target), ("target_b", labels.target_b)):
            if label_N is not None and not labels.dense:
                _checks.check_label_values(name, untransformed(label_N), rows[0].shape[1], labels.ignore_index)
        _checks.check_lam_values(None if labels.lam_N is None else untransformed(labels.lam_N))
    return loss.values(*_without_ignored(rows, labels), **named(*options))


def _without_ignored(rows: Sequence[Tensor], labels: Labels) -> Sequence[Tensor]:
    """Zeros in the rows that weigh nothing: 0 times them is 0, though they be NaN."""
    ignored_N = labels.ignored
    return rows if ignored_N is None else [row.masked_fill(ignored_N.unsqueeze(1), 0) for row in rows]


def _plain_loss_and_grad(loss: Loss, arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
    logits, *others, device_scale_N, host_scale = arguments
    if differentiated(logits):
        name = f"{loss.name}_loss_and_grad"
        raise RuntimeError(
            f"{name}() returns no part of a graph: a transform that differentiates it would find 0; take the loss"
        )
    losses, pull = torch.func.vjp(lambda z: _plain_losses(loss, (z, *others)), logits)[:2]
    return losses, pull(scale_of_rows(losses, device_scale_N, host_scale))[0]


# ------------------------------------------------------------------------------------------------------ custom ops


def _make_forward(loss: Loss) -> CustomOpDef:
    schema = f"({loss.arguments}) -> (Tensor, Tensor, Tensor)"

    @custom_op(f"{NAMESPACE}::{loss.name}", mutates_args=(), schema=schema)
    def forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
        rows, options = loss.split(arguments)
        logits = rows[0]
        if runs_triton(logits):
            label_weight_N = _empty_losses(logits) if options[0].unequal else None
            losses = loss.launch(*rows, *options, want_grad=False, label_weight_N=label_weight_N)[0]
            return losses, losses.new_empty(0), losses.new_empty(0) if label_weight_N is None else label_weight_N
        if logits.is_cpu:
            losses, kept, _ = loss.on_cpu(*rows, *options)
            return losses, kept, losses.new_empty(0)
        losses = loss.values(*rows, **named(*options))
        return losses, losses.new_empty(0), losses.new_empty(0)

    @forward.register_fake
    def _(logits, *others) -> tuple[Tensor, Tensor, Tensor]:
        losses, triton = _empty_losses(logits), runs_triton(logits)
        kept = losses.new_empty(logits.shape if logits.is_cpu and not triton else 0)
        unequal = loss.split((logits, *others))[1][0].unequal
        return losses, kept, _empty_losses(logits) if triton and unequal else losses.new_empty(0)

    return forward


def _make_backward(loss: Loss) -> CustomOpDef:
    schema = f"(Tensor grad_loss, Tensor kept, {loss.arguments}) -> Tensor"

    @custom_op(f"{NAMESPACE}::{loss.name}_backward", mutates_args=(), schema=schema)
    def backward(grad_loss: Tensor, kept: Tensor, *arguments) -> Tensor:
        rows, options = loss.split(arguments)
        logits = rows[0]
        if runs_triton(logits):
            return loss.launch(*rows, *options, grad_loss, want_loss=False)[1]
        if logits.is_cpu:
            return _cpu.scale_(kept.clone(), grad_loss, options[0]).to(logits.dtype)
        return loss.grad(grad_loss, *rows, **named(*options))

    @backward.register_fake
    def _(grad_loss, kept, logits, *others) -> Tensor:
        return _empty_grad(logits)

    return backward


def _make_loss_and_grad(loss: Loss) -> CustomOpDef:
    schema = f"({loss.arguments}, {SCALE}) -> (Tensor, Tensor)"

    @custom_op(f"{NAMESPACE}::{loss.name}_loss_and_grad", mutates_args=(), schema=schema)
    def loss_and_grad(*arguments) -> tuple[Tensor, Tensor]:
        *inputs, device_scale_N, host_scale = arguments
        return in_one_pass(loss, *loss.split(inputs), device_scale_N, host_scale)

    @loss_and_grad.register_fake
    def _(logits, *others) -> tuple[Tensor, Tensor]:
        return _empty_losses(logits), _empty_grad(logits)

    return loss_and_grad


def in_one_pass(
    loss: Loss, rows: Sequence[Tensor], options: Options, device_scale_N: Tensor | None, host_scale: float
) -> tuple[Tensor, Tensor]:
    logits = rows[0]
    if runs_triton(logits):
        return loss.launch(*rows, *options, device_scale_N, host_scale)
    if logits.is_cpu:
        losses, grad, _ = loss.on_cpu(*rows, *options)
        scale_N = scale_of_rows(losses, device_scale_N, host_scale)
        return losses, _cpu.scale_(grad, scale_N, options[0]).to(logits.dtype)
    losses = loss.values(*rows, **named(*options))
    return losses, loss.grad(scale_of_rows(losses, device_scale_N, host_scale), *rows, **named(*options))


def _empty_losses(logits: Tensor) -> Tensor:
    shape = logits.shape[:1] + logits.shape[2:]
    return logits.new_empty(shape, dtype=reference.wide_dtype(logits.dtype))


def _empty_grad(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# -------------------------------------------------------------------------------------------------------- autograd


def _make_pull(loss: Loss, backward: CustomOpDef) -> Callable[..., Tensor]:
    def pull(ctx: Any, grad_loss: Tensor, kept: Tensor, arguments: Sequence[Any]) -> Tensor:
        logits = arguments[0]
        if transformed(grad_loss):
            (grad,) = torch.func.vjp(lambda z: _plain_losses(loss, (z, *arguments[1:])), logits)[1](grad_loss)
            return grad
        rows, options = loss.split(arguments)
        if not _may_spend(kept):
            if ctx.spent:  # an earlier backward pass has scaled it
                with torch.no_grad():
                    kept = loss.on_cpu(*rows, *options)[1]
            return backward(grad_loss, kept, *arguments)
        grad = loss.on_cpu(*rows, *options)[1] if ctx.spent else kept.data
        if is_batched(grad_loss):
            return _cpu.scale_(grad, grad_loss, options[0], in_place=False).to(logits.dtype)
        ctx.spent = True
        return _cpu.scale_(grad, grad_loss, options[0]).to(logits.dtype)

    return pull


def target_grad(loss: Loss, grad_loss: Tensor, arguments: Sequence[Any]) -> Tensor:
    """The gradient of a dense target, in plain PyTorch: differentiable itself."""
    rows, options = loss.split(arguments)
    labels = options[0]
    return reference.dense_target_grad(grad_loss, rows[0], labels.target, labels.uniform, labels.weight_K)


def _differentiate_forward(loss: Loss, forward: CustomOpDef, pull: Callable[..., Tensor]) -> None:
    num_tensors = len(loss.rows) + LABEL_TENSORS  # come first; the other arguments are numbers

    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(output[1], *inputs[:num_tensors])
        ctx.numbers = inputs[num_tensors:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.spent = False
        ctx.set_materialize_grads(False)  # or a zero gradient of N K elements is made for the kept tensors

    def vjp(ctx, grad_loss: Tensor | None, *_: Tensor | None):
        kept, *tensors = ctx.saved_tensors
        arguments = *tensors, *ctx.numbers
        grads: list[Tensor | None] = [None] * len(arguments)
        if grad_loss is not None and ctx.needs_input_grad[0]:
            grads[0] = pull(ctx, grad_loss, kept, arguments)
        if grad_loss is not None and ctx.needs_input_grad[len(loss.rows)]:
            grads[len(loss.rows)] = target_grad(loss, grad_loss, arguments)
        return tuple(grads)

    forward.register_autograd(vjp, setup_context=save)


def _may_spend(kept: Tensor) -> bool:
    """Whether a backward pass may scale the tensor that forward kept, in place and without an operator: where it is not traced.

    An operator takes 100 us from Python, new memory more than that. A second backward must compute it again.
    """
    return type(kept) is Tensor and kept.numel() > 0 and not torch.is_grad_enabled()


def _differentiate_backward(loss: Loss, backward: CustomOpDef) -> None:
    """The second derivative: rare, so it is the reference's formula on every device."""
    num_tensors = len(loss.rows) + LABEL_TENSORS

    def save(ctx, inputs, output) -> None:
        grad_loss, _, *arguments = inputs
        ctx.save_for_backward(grad_loss, *arguments[:num_tensors])
        ctx.numbers = arguments[num_tensors:]

    def vjp(ctx, grad_grad: Tensor):
        grad_loss, *tensors = ctx.saved_tensors
        arguments = *tensors, *ctx.numbers
        rows, options = loss.split(arguments)
        rows = _without_ignored(rows, options[0])
        d_grad_loss, d_logits, d_target = loss.grad_vjp(grad_grad, grad_loss, *rows, **named(*options))
        grads: list[Tensor | None] = [None] * len(arguments)
        grads[0], grads[len(loss.rows)] = d_logits, d_target
        return d_grad_loss, None, *grads

    backward.register_autograd(vjp, setup_context=save)
