"""Softmax cross-entropy with label smoothing and mixup's pair of labels: one pass over the logits, no dense target.

Two entries. `cross_entropy` is safe under autograd: forward, then backward, three times K elements of traffic where
the floor is two. `cross_entropy_loss_and_grad` reaches the floor, for a trainer that calls logits.backward(grad).

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks, reference
from .._launch import runs_triton
from . import _cpu
from ._kernels import launch_cross_entropy
from ._operators import Loss, make_operators
from ._options import (
    LABELS,
    Reduction,
    SmoothingOver,
    checked_labels,
    reduce_rows,
    scale_in_parts,
)

OWN_FROM = 125_000  # logits a thread, from where on an exponential saved outweighs an operator called from Python
NO_LABEL = -(2**31)  # an ignore_index that no label is, for torch's function, which must have one

# ------------------------------------------------------------------------------------------------------ custom ops

_forward, _loss_and_grad = make_operators(
    Loss(
        "cross_entropy",
        rows=("logits",),
        options=LABELS,
        launch=launch_cross_entropy,
        on_cpu=_cpu.cross_entropy,
        values=reference.cross_entropy,
        grad=reference.cross_entropy_grad,
        grad_vjp=reference.cross_entropy_grad_vjp,
    )
)

# ------------------------------------------------------------------------------------------------ public functions


def torchs_is_faster(logits: Tensor) -> bool:
    """On the CPU, of one label: where torch.compile sees through it, without a backward pass, and of few logits."""
    if logits.device.type != "cpu" or runs_triton(logits):
        return False
    if torch.compiler.is_compiling() or not (logits.requires_grad and torch.is_grad_enabled()):
        return True
    return logits.numel() < OWN_FROM * torch.get_num_threads()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
) -> Tensor:
    """Softmax cross-entropy of smoothed, possibly mixed labels.

        loss_n = sum_y w_y (-(1 - s) log p_y - s mean_k log p_k),   p = softmax(logits_n),
        w = {target: lam, target_b: 1 - lam}, or {target: 1} without the pair;   s = smoothing.

    Args:
        logits: (N, K) float16, bfloat16, float32 or float64; not modified. Any row stride; a non-unit class stride
            is copied first.
        target: (N,) int64 or int32, in [0, K).
        smoothing: in [0, 1].
        target_b, lam: mixup's second labels, like target, and the weight of `target`, in [0, 1]: a number, a ()
            tensor, or (N,) for one a sample. Together or not at all. No gradient flows to lam.
        ignore_index: this label weighs nothing, in the loss, the gradient and the mean. None: there is none; saves
            the launches that count them.
        reduction: "mean" divides by the weight of the labels not ignored (NaN if that is 0, as torch has it).
        smoothing_over: "all" takes the mean over all K classes, as torch does (each gets s / K); "others" is the
            paper's form, s / (K - 1) for each of the K - 1 other classes and 1 - s for the label itself.

    Returns:
        () or, for reduction="none", (N,); float32, for float64 logits float64. Also under autocast.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, range or name.
        IndexError: a label out of range, on the CPU. On CUDA that row's loss and gradient are NaN instead; so are
            those of a lam outside [0, 1] (on the CPU a ValueError).

    Costs: no sync, no copy, no dense target. Saves the logits for backward; a GPU nothing else of size N K, the CPU the
    gradient too, in the loss's dtype. Deterministic. Twice differentiable.

    Source: He et al. 2018 (arXiv:1812.01187), sections 5.2 (smoothing) and 5.4 (mixup). Oracle:
    reference.cross_entropy, and torch.nn.functional.cross_entropy in float64.
    """
    labels = checked_labels(logits, target, target_b, lam, smoothing, smoothing_over, ignore_index, reduction)
    if target_b is None and labels.uniform <= 1 and torchs_is_faster(logits):
        return F.cross_entropy(
            reference.wide(logits),
            target.long(),
            reduction=reduction,
            label_smoothing=labels.uniform,
            ignore_index=NO_LABEL if ignore_index is None else ignore_index,
        )
    loss_N, _ = _forward(logits, *labels)
    return reduce_rows(loss_N, reduction, labels.denominator(reduction))


def cross_entropy_loss_and_grad(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
    loss_scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of loss_scale * loss, reading the logits once: for `logits.backward(grad)`.

    Arguments, errors and costs as in `cross_entropy`, and:
        loss_scale: a number or a () tensor on the logits' device; multiplied in float32 before the gradient is
            rounded to the logits' dtype. The returned loss is not scaled.
        ignore_index: here None by default. A number costs a small launch before the pass, because the mean's
            denominator must be known before the first gradient is written.
        reduction: for "none" the losses are (N,) and the gradient is that of their sum.

    Returns:
        The loss and a gradient of the logits' shape and dtype. Neither is part of a graph.

    Costs: one launch for losses and gradient (2 K elements + 12 bytes a row), one more to sum N numbers.
    """
    labels = checked_labels(logits, target, target_b, lam, smoothing, smoothing_over, ignore_index, reduction)
    denominator = labels.denominator(reduction)
    loss_N, grad = _loss_and_grad(logits.detach(), *labels, *scale_in_parts(loss_scale, denominator))
    return reduce_rows(loss_N, reduction, denominator), grad


class CrossEntropyLoss(torch.nn.Module):
    """`cross_entropy` as a module: a drop-in for torch.nn.CrossEntropyLoss on (N, K) logits and N labels.

    Beyond it: `smoothing_over`, and mixup's pair in the call: loss(logits, target, target_b, lam). Short of it: class
    weights and dense (N, K) targets; for those keep torch's.
    """

    def __init__(
        self,
        weight: None = None,
        *,
        ignore_index: int | None = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        smoothing_over: SmoothingOver = "all",
    ) -> None:
        super().__init__()
        if weight is not None:
            raise ValueError("class weights are not supported; use torch.nn.CrossEntropyLoss(weight=...)")
        _checks.check_share("label_smoothing", label_smoothing)
        _checks.check_choice("smoothing_over", smoothing_over, ("all", "others"))
        _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.smoothing_over = smoothing_over

    def forward(
        self, logits: Tensor, target: Tensor, target_b: Tensor | None = None, lam: Tensor | float | None = None
    ) -> Tensor:
        return cross_entropy(
            logits,
            target,
            smoothing=self.label_smoothing,
            target_b=target_b,
            lam=lam,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            smoothing_over=self.smoothing_over,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, smoothing_over={self.smoothing_over!r}"
        )
