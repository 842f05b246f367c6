"""Knowledge distillation: cross-entropy with the labels and with a teacher's softened output, in one pass over both.

Two entries, as in cross_entropy.py: `distillation_loss` is safe under autograd (five times K elements of traffic
where the floor is three), `distillation_loss_and_grad` reaches the floor.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, reference
from . import _cpu
from ._eager import make_losses
from ._kernels import launch_distillation
from ._operators import Loss
from ._options import (
    LABELS,
    WEIGHTS,
    Reduction,
    SmoothingOver,
    checked_labels,
    checked_weights,
    one_smoothing,
)

# ------------------------------------------------------------------------------------------------------ custom ops

_loss, _loss_and_grad = make_losses(
    Loss(
        "distillation",
        rows=("logits", "teacher_logits"),
        options=f"{LABELS}, {WEIGHTS}",
        launch=launch_distillation,
        on_cpu=_cpu.distillation,
        values=reference.distillation,
        grad=reference.distillation_grad,
        grad_vjp=reference.distillation_grad_vjp,
    )
)

# ------------------------------------------------------------------------------------------------ public functions


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 20.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    label_smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
    smoothing: float | None = None,
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
        target, label_smoothing, target_b, lam, ignore_index, reduction, smoothing_over: as in `cross_entropy`. A row whose
            labels are ignored loses both terms.

    Returns, Raises, Costs: as in `cross_entropy`; on a GPU backward reads logits and teacher again.

    Source: He et al. 2018 (arXiv:1812.01187), section 5.3; Hinton et al. 2015 (arXiv:1503.02531), section 2. Oracle:
    reference.distillation, and torch.nn.functional.cross_entropy and kl_div in float64.
    """
    label_smoothing = one_smoothing(label_smoothing, smoothing)
    labels = checked_labels(logits, target, target_b, lam, label_smoothing, smoothing_over, ignore_index, reduction)
    _check_teacher(logits, teacher_logits)
    weights = checked_weights(temperature, hard_weight, soft_weight)
    return _loss((logits, teacher_logits.detach()), (labels, weights), reduction)


def distillation_loss_and_grad(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 20.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    label_smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
    loss_scale: Tensor | float = 1.0,
    smoothing: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The distillation loss, and the gradient of loss_scale * loss, in one pass: for `logits.backward(grad)`.

    Arguments as in `distillation_loss`; loss_scale, ignore_index, reduction and the result as in
    `cross_entropy_loss_and_grad`.

    Costs: one launch for losses and gradient (3 K elements + 12 bytes a row), one more to sum N numbers.
    """
    label_smoothing = one_smoothing(label_smoothing, smoothing)
    labels = checked_labels(logits, target, target_b, lam, label_smoothing, smoothing_over, ignore_index, reduction)
    _check_teacher(logits, teacher_logits)
    weights = checked_weights(temperature, hard_weight, soft_weight)
    return _loss_and_grad((logits, teacher_logits.detach()), (labels, weights), reduction, loss_scale)


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
        smoothing: float | None = None,
    ) -> None:
        super().__init__()
        label_smoothing = one_smoothing(label_smoothing, smoothing)
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
            "label_smoothing": label_smoothing,
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
