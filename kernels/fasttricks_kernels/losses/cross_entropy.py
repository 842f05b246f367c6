"""Softmax cross-entropy with label smoothing and mixup's pair of labels: one pass over the logits, no dense target.

Two entries. `cross_entropy` is safe under autograd: forward, then backward, three times K elements of traffic where
the floor is two. `cross_entropy_loss_and_grad` reaches the floor, for a trainer that calls logits.backward(grad).

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn._reduction import legacy_get_string

from .. import _checks, reference
from .._launch import runs_triton
from .._transforms import transformed, untransformed
from . import _cpu
from ._eager import make_losses
from ._forms import fuses, in_rows
from ._kernels import launch_cross_entropy
from ._operators import Loss
from ._options import (
    LABELS,
    Labels,
    Reduction,
    SmoothingOver,
    checked_labels,
    one_smoothing,
)

OWN_FROM = 90_000  # logits, from where on an exponential saved outweighs a Function in Python; without C, a thread's
SHORT, MANY = 16, 256  # classes of a row below which torch's softmax is slow; so many of them are ours

NARROW = (torch.float16, torch.bfloat16)
NO_LABEL = -(2**62)  # an ignore_index that no label is, for torch's function, which must have one

# ------------------------------------------------------------------------------------------------------ custom ops

_loss, _loss_and_grad = make_losses(
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


def torchs_is_faster(logits: Tensor, target: Tensor, uniform: float, weight: Tensor | None) -> bool:
    """With one label on the CPU: where torch.compile sees through it, and for few logits without smoothing; more without C."""
    if not logits.is_cpu or runs_triton(logits):
        return False
    if torch.compiler.is_compiling():
        return True
    if logits.dtype == torch.float64 or _cpu.compiled() is None:
        trains = (logits.requires_grad or target.requires_grad) and torch.is_grad_enabled()
        return not trains or logits.numel() < OWN_FROM * torch.get_num_threads()
    if target.requires_grad and not logits.requires_grad and logits.shape[1] < SHORT:
        return True  # its one log_softmax serves the loss too
    if logits.dim() == 3 or target.is_floating_point() or (weight is not None and uniform == 0):
        return logits.numel() < OWN_FROM
    return uniform == 0 and logits.numel() < OWN_FROM and (logits.shape[1] >= SHORT or logits.shape[0] < MANY)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int | None = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    smoothing_over: SmoothingOver = "all",
    smoothing: float | None = None,
) -> Tensor:
    """torch.nn.functional.cross_entropy, its arguments in its order, and mixup's pair of labels.

        loss_n = sum_y w_y (-(1 - s) c_y log p_y - s mean_k c_k log p_k),   p = softmax(logits_n),
        w = {target: lam, target_b: 1 - lam}, or {target: 1} without the pair;   s = label_smoothing;   c = weight, or 1.

    A target of the input's shape and dtype, or float32 for narrower logits, is dense, such as class probabilities t:

        loss_n = -sum_k c_k q_k log p_k,   q = (1 - s) t + s / K,   and a mean is that over samples.

    Args:
        input: the logits, (N, K), (K,) or (N, K, d1, ...), float16, bfloat16, float32 or float64; not modified. (N, K) logits
            may have any row stride, and a non-unit class stride is copied first. Logits of more dimensions are copied
            where they are neither contiguous nor channels-last.
        target: (N,), () or (N, d1, ...) int64, int32 or uint8, in [0, K). Or dense targets t, as above, which may require
            grad.
        label_smoothing, or by its other name `smoothing`: in [0, 1].
        target_b, lam: mixup's second labels, like target, and the weight of `target`, in [0, 1]: a number, a ()
            tensor, or (N,) for one a sample. Together or not at all. No gradient flows to lam.
        weight: (K,) of the classes, like input, or float32 for narrower logits. A class of weight 0 counts nothing.
        ignore_index: this label weighs nothing, in the loss, the gradient and the mean. None: there is none; saves
            the launches that count them on a GPU.
        reduction: "mean" divides by the weight of the labels not ignored, sum_n sum_y w_y c_y (NaN if that is 0, as
            torch has it).
        size_average, reduce: torch's deprecated names of the reduction, with torch's warning.
        smoothing_over: "all" takes the mean over all K classes, as torch does (each gets s / K); "others" is the
            paper's form, s / (K - 1) for each of the K - 1 other classes and 1 - s for the label itself.
        input and target of torch's other forms, a weight that requires grad: as torch has them, by torch's operator.
            Not together with target_b, smoothing_over="others" or ignore_index=None, which torch does not have.

    Returns:
        () or, for reduction="none", the labels' shape; float32, for float64 logits float64. Also under autocast.

    Raises:
        As torch does, with torch's text, where torch's function has the arguments. And:
        TypeError, ValueError: a wrong dtype, shape, device, range or name of target_b, lam or smoothing_over, and of all
            that comes with them; a smoothing that is negative or NaN, which torch takes for 0.
        IndexError: a label out of range, on the CPU. On CUDA that row's loss and gradient are NaN instead; so are
            those of a lam outside [0, 1] (on the CPU a ValueError).

    Costs: no sync, no copy, no dense target. Saves the logits for backward; a GPU nothing else of size N K, the CPU the
    gradient too, in the loss's dtype. A dense target's gradient is one log_softmax more. Deterministic. Twice differentiable.
    An eager call is one torch.autograd.Function that launches directly; under torch.compile, export, torch.func, fake
    tensors and modes it is an operator, or plain PyTorch.

    Source: He et al. 2018 (arXiv:1812.01187), sections 5.2 (smoothing) and 5.4 (mixup). Oracle:
    reference.cross_entropy, and torch.nn.functional.cross_entropy in float64.
    """
    label_smoothing = one_smoothing(label_smoothing, smoothing)
    if size_average is not None or reduce is not None:
        reduction = cast(Reduction, legacy_get_string(size_average, reduce))
    if target_b is not None or lam is not None or smoothing_over != "all" or ignore_index is None:  # beyond torch's
        of_torchs = target_b is None and lam is None and fuses(input, target, weight, "mean", 0.0)
        of_torchs = of_torchs and not target.is_floating_point()
        logits, target_N = in_rows(input, target) if of_torchs else (input, target)
        labels = checked_labels(
            logits,
            target_N,
            target_b,
            lam,
            label_smoothing,
            smoothing_over,
            ignore_index,
            reduction,
            weight,
            planes=of_torchs,
        )
        if target_b is None and labels.uniform <= 1 and torchs_is_faster(logits, target, labels.uniform, weight):
            return by_torch(input, target, weight, ignore_index, reduction, labels.uniform)
    elif not fuses(input, target, weight, reduction, label_smoothing, ignore_index):
        return by_torch(input, target, weight, ignore_index, reduction, label_smoothing)
    else:
        logits, target_N = in_rows(input, target)
        if torchs_is_faster(logits, target, label_smoothing, weight):
            return by_torch(input, target, weight, ignore_index, reduction, label_smoothing)
        labels = Labels(target_N, None, None, weight, 1.0, label_smoothing, ignore_index)
    try:
        loss = _loss((logits,), (labels,), reduction)
    except IndexError as error:  # of the rows or planes; it names the place in the caller's tensor
        raise _checks.bad_label("target", untransformed(target), logits.shape[1], ignore_index) or error from None
    if reduction != "none" or logits is input:
        return loss
    return loss.view(input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())


def may_ignore(input: Tensor, target: Tensor, ignore_index: int) -> bool:
    """Whether there is an ignored row whose gradient counts; where a value cannot be read, whether there might be one."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor) or target.is_floating_point():
        return False
    unread = torch.compiler.is_compiling() or transformed(input, target) or type(target) is not Tensor
    if not unread and not (input.requires_grad and torch.is_grad_enabled()):
        return False
    if not input.is_floating_point() or input.dim() == 0 or target.dim() != max(0, input.dim() - 1):
        return False  # for torch to refuse
    if target.shape != (input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()):
        return False
    if unread or not target.is_cpu:
        return True
    if target.dim() == 1 and target.shape[0] <= 512:
        return ignore_index in target.tolist()  # 3 us, where NumPy's two calls take 15 from a cold cache
    return bool((target.numpy() == ignore_index).any())


def by_torch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    reduction: Reduction,
    label_smoothing: float,
) -> Tensor:
    """torch's own operator, which raises its own errors; of 16-bit logits in float32, as the fused loss."""
    if isinstance(input, Tensor) and input.dtype in NARROW:
        narrow = input.dtype
        input = input.float()
        if weight is not None and weight.dtype == narrow:
            weight = weight.float()
        if isinstance(target, Tensor) and target.dtype in NARROW:  # torch would round the smoothed ones to it
            target = target.float()
    if isinstance(target, Tensor) and (
        target.dtype == torch.int32 or (target.dtype == torch.uint8 and target.dim() == 1)
    ):
        target = target.long()
    if ignore_index is None:
        ignore_index = NO_LABEL
        if isinstance(target, Tensor) and target.dtype == torch.int64:
            target = target.clamp(min=NO_LABEL + 1)  # out of range as before
    elif may_ignore(input, target, ignore_index):  # 0, and not 0 * NaN, is the gradient of ignored rows
        input = input.masked_fill((target == ignore_index).unsqueeze(min(1, target.dim())), 0)
    return F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


def cross_entropy_loss_and_grad(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
    loss_scale: Tensor | float = 1.0,
    smoothing: float | None = None,
    weight: Tensor | None = None,
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
    label_smoothing = one_smoothing(label_smoothing, smoothing)
    labels = checked_labels(
        logits, target, target_b, lam, label_smoothing, smoothing_over, ignore_index, reduction, weight
    )
    return _loss_and_grad((logits,), (labels,), reduction, loss_scale)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`cross_entropy` as a module: torch.nn.CrossEntropyLoss, its arguments in its order, its attributes and its buffer `weight`.

    Beyond it: `smoothing_over`, ignore_index=None, and mixup's pair in the call: loss(input, target, target_b, lam).
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int | None = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        smoothing_over: SmoothingOver = "all",
        smoothing: float | None = None,
    ) -> None:
        label_smoothing = one_smoothing(label_smoothing, smoothing)
        _checks.check_choice("smoothing_over", smoothing_over, ("all", "others"))
        if size_average is None and reduce is None:
            _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        super().__init__(weight, size_average, -100, reduce, reduction, label_smoothing)
        self.ignore_index = ignore_index  # type: ignore[assignment]  # torch's takes no None
        self.smoothing_over = smoothing_over

    def forward(
        self, input: Tensor, target: Tensor, target_b: Tensor | None = None, lam: Tensor | float | None = None
    ) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=cast(Reduction, self.reduction),
            label_smoothing=self.label_smoothing,
            target_b=target_b,
            lam=lam,
            smoothing_over=self.smoothing_over,
        )

    def extra_repr(self) -> str:
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}, smoothing_over={self.smoothing_over!r}"
        )
