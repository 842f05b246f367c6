"""Softmax cross-entropy with label smoothing and mixup's pair of labels: one pass over the logits, no dense target.

Two entries. `cross_entropy` is safe under autograd: forward, then backward, three times K elements of traffic where
the floor is two. `cross_entropy_loss_and_grad` reaches the floor, for a trainer that calls logits.backward(grad).
One kernel serves both: what it need not write is compiled away.

Over 300 lines because a family stays in one file, and half of it is what a caller needs to know.

Shape suffixes: N samples, K classes; in device code R rows of a program, C lanes along a row.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr, and torch.library the schema, from annotations.
from typing import Literal, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _cpu, reference
from ._launch import NAMESPACE, broadcast_stride, dense_rows, on_device_of, runs_triton, tile_of_rows
from ._reduce import checked_smoothing, grad_scale, mean_weight, reduce_rows, split_lam
from ._rows import (
    columns_of,
    cross_terms,
    labels_and_weights,
    load_rows,
    packed,
    per_row,
    raised_max,
    store_rows,
    sum_of_exp,
    target_distribution,
    unpacked,
)

Reduction = Literal["mean", "sum", "none"]
SmoothingOver = Literal["all", "others"]
OWN_FROM = 500_000  # logits, from where on an exponential saved outweighs an operator called from Python
NO_LABEL = -(2**31)  # an ignore_index that no label is, for torch's function, which must have one

# ---------------------------------------------------------------------------------------------------- device code


@triton.jit(do_not_specialize=["N"])
def cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    target_b_ptr,
    lam_ptr,
    scale_ptr,
    loss_ptr,
    grad_ptr,
    N,
    lam,
    smoothing,
    scale,
    IGNORE: tl.constexpr,
    LAM_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HELD: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Loss and scaled gradient of ROWS rows; an output or an option whose pointer is None is compiled away."""
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lam_R = per_row(lam_ptr, lam, row_R, N, LAM_STRIDE) + tl.zeros([ROWS], tl.float32)
    label_R, weight_R, label_b_R, weight_b_R, total_R = labels_and_weights(
        target_ptr, target_b_ptr, lam_R, row_R, N, K, IGNORE
    )

    # The row is read here, once, and HELD in registers; only one too long for them is read again below.
    max_R = tl.full([ROWS], float("-inf"), tl.float32)
    sum_exp_R = tl.zeros([ROWS], tl.float32)
    held = ()
    for chunk in tl.static_range(CHUNKS):
        raw_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED)
        if HELD:
            raw_RC = packed(raw_RC, True)
            held = held + (raw_RC,)  # type: ignore[assignment]
        x_RC = raw_RC.to(tl.float32)
        old_max_R = max_R
        max_R, safe_max_R = raised_max(max_R, x_RC)
        sum_exp_R = sum_of_exp(sum_exp_R, old_max_R, safe_max_R, x_RC, 1.0)

    # The sum is of q (x - max): at logits of 6e4 a sum of q x would leave no digits for the loss. And p is
    # exp(x - max - log sum): with exp(x - max) / sum the compiler keeps every exp from above, and spills long rows.
    log_sum_R = tl.log(sum_exp_R)
    cross_RC = tl.zeros([ROWS, BLOCK], tl.float32)
    # The loss scale multiplies in float32, before the one rounding: the other order flushes small gradients.
    scale_R = per_row(scale_ptr, 1.0, row_R, N, SCALE_STRIDE) * scale + tl.zeros([ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if HELD:
            x_RC = unpacked(held[chunk], sum_exp_R, True)
        else:
            x_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED).to(tl.float32)
        x_RC = x_RC - max_R[:, None]
        column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
        q_RC = target_distribution(
            column_RC, label_R, weight_R, label_b_R, weight_b_R, total_R, smoothing, K, target_b_ptr is not None
        )
        if loss_ptr is not None:
            cross_RC += cross_terms(q_RC, x_RC, column_RC, K)
        if grad_ptr is not None:
            grad_RC = scale_R[:, None] * (total_R[:, None] * tl.exp(x_RC - log_sum_R[:, None]) - q_RC)
            grad_RC = tl.where((total_R == 0)[:, None], 0.0, grad_RC)
            store_rows(grad_ptr, grad_RC, row_R, N, chunk, K, BLOCK, GROUP, SHIFTED)

    if loss_ptr is not None:
        loss_R = tl.where(total_R == 0, 0.0, total_R * log_sum_R - tl.sum(cross_RC, 1))
        tl.store(loss_ptr + row_R, loss_R, mask=row_R < N)


# --------------------------------------------------------------------------------------------------------- launch


def launch_cross_entropy(
    logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
    scale_N: Optional[Tensor],
    scale: float,
    want_loss: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (N,) float32 and gradient (N, K); the one not wanted comes back empty."""
    logits_NK = dense_rows(logits_NK)
    num_rows = logits_NK.shape[0]
    loss_N = logits_NK.new_empty(num_rows if want_loss else 0, dtype=torch.float32)
    grad_NK = torch.empty(logits_NK.shape if want_grad else 0, dtype=logits_NK.dtype, device=logits_NK.device)
    if num_rows == 0:  # a grid of 0 programs is an error
        return loss_N, grad_NK
    tile = tile_of_rows(logits_NK)
    with on_device_of(logits_NK):
        cross_entropy_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            logits_NK,
            target_N.contiguous(),
            None if target_b_N is None else target_b_N.contiguous(),
            lam_N,
            scale_N,
            loss_N if want_loss else None,
            grad_NK if want_grad else None,
            num_rows,
            lam,
            smoothing,
            scale,
            IGNORE=ignore_index,
            LAM_STRIDE=broadcast_stride(lam_N),
            SCALE_STRIDE=broadcast_stride(scale_N),
            **tile,
        )
    return loss_N, grad_NK


# ----------------------------------------------------------------------------------------------------- custom ops
# `lam_N` overrides `lam`, `scale_N` multiplies `scale`: a number goes to the kernel as an argument, not as a tensor,
# so that nothing is copied to the device for it.


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy", mutates_args=())
def _forward(
    logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
) -> tuple[Tensor, Tensor]:
    """Losses, and on the CPU their gradient for backward; a GPU computes that again rather than keep it."""
    if runs_triton(logits):
        launched = launch_cross_entropy(
            logits, target, target_b, lam_N, lam, smoothing, ignore_index, None, 1.0, True, False
        )
        return launched[0], logits.new_empty(0)
    share = lam if lam_N is None else lam_N
    if not keeps_grad(logits):
        loss = reference.cross_entropy(logits, target, target_b, share, smoothing=smoothing, ignore_index=ignore_index)
        return loss, logits.new_empty(0)
    _checks.check_lam_values(lam_N)
    return _cpu.cross_entropy(logits, target, target_b, share, smoothing, ignore_index)


@_forward.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
) -> tuple[Tensor, Tensor]:
    dtype = reference.wide_dtype(logits.dtype)
    kept = logits.new_empty(logits.shape, dtype=dtype) if keeps_grad(logits) else logits.new_empty(0)
    return logits.new_empty(logits.shape[0], dtype=dtype), kept


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    kept: Tensor,
    logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
) -> Tensor:
    if runs_triton(logits):
        return launch_cross_entropy(
            logits, target, target_b, lam_N, lam, smoothing, ignore_index, grad_loss, 1.0, False, True
        )[1]
    share = lam if lam_N is None else lam_N
    if keeps_grad(logits):
        return _cpu.scaled(kept, grad_loss, target, target_b, share, ignore_index, logits.dtype)
    return reference.cross_entropy_grad(
        grad_loss, logits, target, target_b, share, smoothing=smoothing, ignore_index=ignore_index
    )


@_backward.register_fake
def _(
    grad_loss: Tensor,
    kept: Tensor,
    logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_loss_and_grad", mutates_args=())
def _loss_and_grad(
    logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
    scale_N: Optional[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    if runs_triton(logits):
        return launch_cross_entropy(
            logits, target, target_b, lam_N, lam, smoothing, ignore_index, scale_N, scale, True, True
        )
    loss, kept = _forward(logits, target, target_b, lam_N, lam, smoothing, ignore_index)
    scale_of_N = torch.full_like(loss, scale) if scale_N is None else (scale * scale_N).to(loss.dtype).expand_as(loss)
    return loss, _backward(scale_of_N, kept, logits, target, target_b, lam_N, lam, smoothing, ignore_index)


@_loss_and_grad.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
    scale_N: Optional[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=reference.wide_dtype(logits.dtype))
    return loss, torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def keeps_grad(logits: Tensor) -> bool:
    return logits.is_cpu and not runs_triton(logits)


def torchs_is_faster(logits: Tensor) -> bool:
    """On the CPU, of one label: without a backward pass, of few logits, and where torch.compile sees through it."""
    if logits.device.type != "cpu" or runs_triton(logits):
        return False
    backward = logits.requires_grad and torch.is_grad_enabled()
    return not backward or logits.numel() < OWN_FROM or torch.compiler.is_compiling()


# ------------------------------------------------------------------------------------------------------- autograd


def _save_forward(ctx, inputs, output) -> None:
    logits, target, target_b, lam_N, *ctx.options = inputs
    ctx.save_for_backward(output[1], logits, target, target_b, lam_N)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or a zero gradient of N K elements is made for what is kept


def _forward_vjp(ctx, grad_loss: Optional[Tensor], _: Optional[Tensor]):
    if grad_loss is None:
        return (None,) * 7
    kept, logits, target, target_b, lam_N = ctx.saved_tensors
    if type(kept) is Tensor and kept.numel() and not torch.is_grad_enabled():
        # What the operator would do, without the 100 us of calling one from Python; nobody traces or differentiates it.
        lam, _, ignore_index = ctx.options
        share = lam if lam_N is None else lam_N
        grad = _cpu.scaled(kept, grad_loss, target, target_b, share, ignore_index, logits.dtype)
        return grad, *[None] * 6
    return _backward(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 6


def _save_backward(ctx, inputs, output) -> None:
    grad_loss, _, logits, target, target_b, lam_N, *ctx.options = inputs
    ctx.save_for_backward(grad_loss, logits, target, target_b, lam_N)


def _backward_vjp(ctx, grad_grad: Tensor):
    """The second derivative: rare, so it is the reference's formula on every device."""
    grad_loss, logits, target, target_b, lam_N = ctx.saved_tensors
    lam, smoothing, ignore_index = ctx.options
    d_grad_loss, d_logits = reference.cross_entropy_grad_vjp(
        grad_grad,
        grad_loss,
        logits,
        target,
        target_b,
        lam if lam_N is None else lam_N,
        smoothing=smoothing,
        ignore_index=ignore_index,
    )
    return d_grad_loss, None, d_logits, *[None] * 6


_forward.register_autograd(_forward_vjp, setup_context=_save_forward)
_backward.register_autograd(_backward_vjp, setup_context=_save_backward)

# ------------------------------------------------------------------------------------------------ public functions


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.0,
    target_b: Optional[Tensor] = None,
    lam: "Tensor | float | None" = None,
    ignore_index: Optional[int] = -100,
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
    lam_N, lam_number = split_lam(lam)
    smoothing = checked_smoothing(logits, target, target_b, lam, smoothing, smoothing_over, reduction)
    if target_b is None and smoothing <= 1 and torchs_is_faster(logits):
        return F.cross_entropy(
            reference.wide(logits),
            target.long(),
            reduction=reduction,
            label_smoothing=smoothing,
            ignore_index=NO_LABEL if ignore_index is None else ignore_index,
        )
    loss_N, _ = _forward(logits, target, target_b, lam_N, lam_number, smoothing, ignore_index)
    denominator = mean_weight(target, target_b, lam, ignore_index) if reduction == "mean" else 1
    return reduce_rows(loss_N, reduction, denominator)


def cross_entropy_loss_and_grad(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.0,
    target_b: Optional[Tensor] = None,
    lam: "Tensor | float | None" = None,
    ignore_index: Optional[int] = None,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
    loss_scale: "Tensor | float" = 1.0,
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
    lam_N, lam_number = split_lam(lam)
    smoothing = checked_smoothing(logits, target, target_b, lam, smoothing, smoothing_over, reduction)
    denominator = mean_weight(target, target_b, lam, ignore_index) if reduction == "mean" else 1
    scale_N, scale = grad_scale(loss_scale, reduction, denominator)
    loss_N, grad = _loss_and_grad(
        logits.detach(), target, target_b, lam_N, lam_number, smoothing, ignore_index, scale_N, scale
    )
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
        ignore_index: Optional[int] = -100,
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
        self, logits: Tensor, target: Tensor, target_b: Optional[Tensor] = None, lam: "Tensor | float | None" = None
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
