"""Knowledge distillation: cross-entropy with the labels and with a teacher's softened output, in one pass over both.

Two entries, as in cross_entropy.py: `distillation_loss` is safe under autograd (five times K elements of traffic
where the floor is three), `distillation_loss_and_grad` reaches the floor.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks, reference
from .._launch import NAMESPACE, runs_triton
from . import _cpu
from ._kernels import launch_distillation
from ._options import (
    LABELS,
    SCALE,
    WEIGHTS,
    Labels,
    Reduction,
    SmoothingOver,
    Weights,
    checked_labels,
    checked_weights,
    grad_scale,
    reduce_rows,
    row_scale,
)

OPTIONS = f"{LABELS}, {WEIGHTS}"


def parted(options: Sequence[Any]) -> tuple[Labels, Weights]:
    """OPTIONS by position in their two parts."""
    return Labels(*options[: len(Labels._fields)]), Weights(*options[len(Labels._fields) :])


# ----------------------------------------------------------------------------------------------------- custom ops


@torch.library.custom_op(
    f"{NAMESPACE}::distillation",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor teacher_logits, {OPTIONS}) -> (Tensor, Tensor)",
)
def _forward(logits: Tensor, teacher_logits: Tensor, *options) -> tuple[Tensor, Tensor]:
    """As cross_entropy's: losses, and on the CPU their gradient for backward."""
    labels, weights = parted(options)
    if runs_triton(logits):
        loss, _ = launch_distillation(logits, teacher_logits, labels, weights, want_grad=False)
        return loss, logits.new_empty(0)
    if _cpu.keeps_grad(logits):
        return _cpu.distillation(logits, teacher_logits, labels, weights)
    loss = reference.distillation(logits, teacher_logits, **labels.named, **weights._asdict())
    return loss, logits.new_empty(0)


@_forward.register_fake
def _(logits, teacher_logits, *options) -> tuple[Tensor, Tensor]:
    return _cpu.fake(logits)


@torch.library.custom_op(
    f"{NAMESPACE}::distillation_backward",
    mutates_args=(),
    schema=f"(Tensor grad_loss, Tensor kept, Tensor logits, Tensor teacher_logits, {OPTIONS}) -> Tensor",
)
def _backward(grad_loss: Tensor, kept: Tensor, logits: Tensor, teacher_logits: Tensor, *options) -> Tensor:
    labels, weights = parted(options)
    if runs_triton(logits):
        return launch_distillation(logits, teacher_logits, labels, weights, grad_loss, want_loss=False)[1]
    if _cpu.keeps_grad(logits):
        return _cpu.scale_(kept.clone(), grad_loss, labels).to(logits.dtype)
    return reference.distillation_grad(grad_loss, logits, teacher_logits, **labels.named, **weights._asdict())


@_backward.register_fake
def _(grad_loss, kept, logits, *options) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(
    f"{NAMESPACE}::distillation_loss_and_grad",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor teacher_logits, {OPTIONS}, {SCALE}) -> (Tensor, Tensor)",
)
def _loss_and_grad(logits: Tensor, teacher_logits: Tensor, *options) -> tuple[Tensor, Tensor]:
    *parts, scale_N, scale = options
    labels, weights = parted(parts)
    if runs_triton(logits):
        return launch_distillation(logits, teacher_logits, labels, weights, scale_N, scale)
    if _cpu.keeps_grad(logits):
        loss, grad = _cpu.distillation(logits, teacher_logits, labels, weights)
        return loss, _cpu.scale_(grad, row_scale(loss, scale_N, scale), labels).to(logits.dtype)
    both = {**labels.named, **weights._asdict()}
    loss = reference.distillation(logits, teacher_logits, **both)
    return loss, reference.distillation_grad(row_scale(loss, scale_N, scale), logits, teacher_logits, **both)


@_loss_and_grad.register_fake
def _(logits, *options) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=reference.wide_dtype(logits.dtype))
    return loss, torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# ------------------------------------------------------------------------------------------------------- autograd


def _save_forward(ctx, inputs, output) -> None:
    logits, teacher_logits, target, target_b, lam_N, *ctx.numbers = inputs
    ctx.save_for_backward(output[1], logits, teacher_logits, target, target_b, lam_N)
    ctx.mark_non_differentiable(output[1])
    ctx.spent = False
    ctx.set_materialize_grads(False)  # or a zero gradient of N K elements is made for what is kept


def _forward_vjp(ctx, grad_loss: Tensor | None, _: Tensor | None):
    kept, logits, teacher_logits, *tensors = ctx.saved_tensors
    options = *tensors, *ctx.numbers
    nothing = (None,) * (1 + len(options))
    if grad_loss is None:
        return None, *nothing
    if _cpu.may_spend(kept):
        labels, weights = parted(options)
        kept = _cpu.distillation(logits, teacher_logits, labels, weights)[1] if ctx.spent else kept.data
        ctx.spent = True
        return _cpu.scale_(kept, grad_loss, labels).to(logits.dtype), *nothing
    return _backward(grad_loss, kept, logits, teacher_logits, *options), *nothing


def _save_backward(ctx, inputs, output) -> None:
    grad_loss, _, logits, teacher_logits, target, target_b, lam_N, *ctx.numbers = inputs
    ctx.save_for_backward(grad_loss, logits, teacher_logits, target, target_b, lam_N)


def _backward_vjp(ctx, grad_grad: Tensor):
    """The second derivative: rare, so it is the reference's formula on every device."""
    grad_loss, logits, teacher_logits, *tensors = ctx.saved_tensors
    options = *tensors, *ctx.numbers
    labels, weights = parted(options)
    d_grad_loss, d_logits = reference.distillation_grad_vjp(
        grad_grad, grad_loss, logits, teacher_logits, **labels.named, **weights._asdict()
    )
    return d_grad_loss, None, d_logits, None, *[None] * len(options)


_forward.register_autograd(_forward_vjp, setup_context=_save_forward)
_backward.register_autograd(_backward_vjp, setup_context=_save_backward)

# ------------------------------------------------------------------------------------------------ public functions


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 20.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
) -> Tensor:
    """Distillation loss: the labels' cross-entropy and T^2 times the teacher's, at temperature T.

        loss_n = hard_weight ce(logits, labels) + soft_weight T^2 ce(logits / T, softmax(teacher_logits / T))

    T^2 F.kl_div(log_softmax(logits / T), softmax(teacher_logits / T)) differs from the second term by the teacher's
    entropy, which has no gradient in the student.

    Args:
        logits: (N, K), as in `cross_entropy`.
        teacher_logits: like logits in shape, dtype and device. No gradient flows to it. Rows that are not contiguous
            are copied first.
        temperature: T > 0. The paper's is 20.
        hard_weight, soft_weight: finite, at least 0. The paper's loss is 1 and 1; its authors' code uses 0.5 and 0.5,
            which halves the gradient.
        target, smoothing, target_b, lam, ignore_index, reduction, smoothing_over: as in `cross_entropy`. A row whose
            labels are ignored loses both terms.

    Returns, Raises, Costs: as in `cross_entropy`; on a GPU backward reads logits and teacher again.

    Source: He et al. 2018 (arXiv:1812.01187), section 5.3; Hinton et al. 2015 (arXiv:1503.02531), section 2. Oracle:
    reference.distillation, and torch.nn.functional.cross_entropy and kl_div in float64.
    """
    labels = checked_labels(logits, target, target_b, lam, smoothing, smoothing_over, ignore_index, reduction)
    _check_teacher(logits, teacher_logits)
    weights = checked_weights(temperature, hard_weight, soft_weight)
    loss_N, _ = _forward(logits, teacher_logits.detach(), *labels, *weights)
    return reduce_rows(loss_N, reduction, labels.denominator(reduction))


def distillation_loss_and_grad(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 20.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
    loss_scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The distillation loss, and the gradient of loss_scale * loss, in one pass: for `logits.backward(grad)`.

    Arguments as in `distillation_loss`; loss_scale, ignore_index, reduction and the result as in
    `cross_entropy_loss_and_grad`.

    Costs: one launch for losses and gradient (3 K elements + 12 bytes a row), one more to sum N numbers.
    """
    labels = checked_labels(logits, target, target_b, lam, smoothing, smoothing_over, ignore_index, reduction)
    _check_teacher(logits, teacher_logits)
    weights = checked_weights(temperature, hard_weight, soft_weight)
    denominator = labels.denominator(reduction)
    loss_N, grad = _loss_and_grad(
        logits.detach(), teacher_logits.detach(), *labels, *weights, *grad_scale(loss_scale, denominator)
    )
    return reduce_rows(loss_N, reduction, denominator), grad


def _check_teacher(logits: Tensor, teacher_logits: Tensor) -> None:
    _checks.check_same("teacher_logits", teacher_logits, "logits", logits)
    if teacher_logits.dtype != logits.dtype:
        raise TypeError(f"teacher_logits are {teacher_logits.dtype}, but logits {logits.dtype}; cast the teacher's")


class DistillationLoss(torch.nn.Module):
    """`distillation_loss` as a module: loss(logits, teacher_logits, target, target_b=None, lam=None)."""

    def __init__(
        self,
        temperature: float = 20.0,
        hard_weight: float = 1.0,
        soft_weight: float = 1.0,
        *,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        smoothing_over: SmoothingOver = "all",
    ) -> None:
        super().__init__()
        checked_weights(temperature, hard_weight, soft_weight)
        _checks.check_share("label_smoothing", label_smoothing)
        _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        _checks.check_choice("smoothing_over", smoothing_over, ("all", "others"))
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "hard_weight": hard_weight,
            "soft_weight": soft_weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "smoothing": label_smoothing,
            "smoothing_over": smoothing_over,
        }

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        lam: Tensor | float | None = None,
    ) -> Tensor:
        return distillation_loss(logits, teacher_logits, target, target_b=target_b, lam=lam, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
