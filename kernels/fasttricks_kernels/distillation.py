"""Knowledge distillation: cross-entropy with the labels and with a teacher's softened output, in one pass over both.

Two entries, as in cross_entropy.py: `distillation_loss` is safe under autograd (five times K elements of traffic
where the floor is three), `distillation_loss_and_grad` reaches the floor.

Over 300 lines because a family stays in one file, and half of it is what a caller needs to know.

Shape suffixes: N samples, K classes; in device code R rows of a program, C lanes along a row.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr, and torch.library the schema, from annotations.
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from .cross_entropy import Reduction, SmoothingOver

# ---------------------------------------------------------------------------------------------------- device code


@triton.jit(do_not_specialize=["N"])
def distillation_kernel(
    logits_ptr,
    teacher_ptr,
    target_ptr,
    target_b_ptr,
    lam_ptr,
    scale_ptr,
    loss_ptr,
    grad_ptr,
    N,
    lam,
    smoothing,
    temperature,
    hard_weight,
    soft_weight,
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
    """Loss and scaled gradient of ROWS rows; an output or an option whose pointer is None is compiled away.

    With d = logits - max, and c = hard_weight q + soft_weight W T softmax(teacher / T):

        loss = W (hard_weight log sum exp(d) + soft_weight T^2 log sum exp(d / T)) - sum_k c_k d_k
        grad = W (hard_weight softmax(d) + soft_weight T softmax(d / T)) - c
    """
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lam_R = per_row(lam_ptr, lam, row_R, N, LAM_STRIDE) + tl.zeros([ROWS], tl.float32)
    label_R, weight_R, label_b_R, weight_b_R, total_R = labels_and_weights(
        target_ptr, target_b_ptr, lam_R, row_R, N, K, IGNORE
    )
    coldness = 1.0 / temperature

    # Both rows are read here, once, and HELD in registers; only those too long for them are read again below.
    held = ()
    teacher_held = ()
    if HELD:
        # Maxima first, then sums, lane by lane: two reductions a row, where a running maximum takes one a chunk, and
        # the order in which the fewest registers are live.
        max_RC = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
        teacher_max_RC = max_RC
        for chunk in tl.static_range(CHUNKS):
            x_RC = packed(load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED), CHUNKS > 1)
            t_RC = packed(load_rows(teacher_ptr, row_R, N, chunk, K, K, BLOCK, GROUP, SHIFTED), CHUNKS > 1)
            max_RC = tl.maximum(max_RC, x_RC.to(tl.float32))
            teacher_max_RC = tl.maximum(teacher_max_RC, t_RC.to(tl.float32))
            held = held + (x_RC,)  # type: ignore[assignment]
            teacher_held = teacher_held + (t_RC,)  # type: ignore[assignment]
        max_R = tl.max(max_RC, 1)
        teacher_max_R = tl.max(teacher_max_RC, 1)
        # always 0, known only when both maxima are
        known_R = tl.where((max_R == 0) & (teacher_max_R == 0) & (N < 0), -1.0, 0.0)
        sum_RC = tl.zeros([ROWS, BLOCK], tl.float32)  # of exp(d), of exp(d / T), and of the teacher's exp(d / T)
        soft_sum_RC = tl.zeros([ROWS, BLOCK], tl.float32)
        teacher_sum_RC = tl.zeros([ROWS, BLOCK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            x_RC = unpacked(held[chunk], known_R, CHUNKS > 1) - max_R[:, None]
            sum_RC += tl.exp(x_RC)
            soft_sum_RC += tl.exp(coldness * x_RC)
            t_RC = unpacked(teacher_held[chunk], known_R, CHUNKS > 1) - teacher_max_R[:, None]
            teacher_sum_RC += tl.exp(coldness * t_RC)
        sum_R = tl.sum(sum_RC, 1)
        soft_sum_R = tl.sum(soft_sum_RC, 1)
        teacher_sum_R = tl.sum(teacher_sum_RC, 1)
    else:
        max_R = tl.full([ROWS], float("-inf"), tl.float32)
        teacher_max_R = max_R
        sum_R = tl.zeros([ROWS], tl.float32)
        soft_sum_R = tl.zeros([ROWS], tl.float32)
        teacher_sum_R = tl.zeros([ROWS], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            x_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED).to(tl.float32)
            old_max_R = max_R
            max_R, safe_max_R = raised_max(max_R, x_RC)
            sum_R = sum_of_exp(sum_R, old_max_R, safe_max_R, x_RC, 1.0)
            soft_sum_R = sum_of_exp(soft_sum_R, old_max_R, safe_max_R, x_RC, coldness)
            t_RC = load_rows(teacher_ptr, row_R, N, chunk, K, K, BLOCK, GROUP, SHIFTED).to(tl.float32)
            old_max_R = teacher_max_R
            teacher_max_R, safe_max_R = raised_max(teacher_max_R, t_RC)
            teacher_sum_R = sum_of_exp(teacher_sum_R, old_max_R, safe_max_R, t_RC, coldness)
    sums_R = sum_R + soft_sum_R + teacher_sum_R

    log_sum_R = tl.log(sum_R)
    soft_log_sum_R = tl.log(soft_sum_R)
    teacher_log_sum_R = tl.log(teacher_sum_R)
    soft_R = soft_weight * temperature * total_R
    cross_RC = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_R = per_row(scale_ptr, 1.0, row_R, N, SCALE_STRIDE) * scale + tl.zeros([ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if HELD:
            x_RC = unpacked(held[chunk], sums_R, CHUNKS > 1)
            t_RC = unpacked(teacher_held[chunk], sums_R, CHUNKS > 1)
        else:
            x_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED).to(tl.float32)
            t_RC = load_rows(teacher_ptr, row_R, N, chunk, K, K, BLOCK, GROUP, SHIFTED).to(tl.float32)
        x_RC = x_RC - max_R[:, None]
        column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
        c_RC = hard_weight * target_distribution(
            column_RC, label_R, weight_R, label_b_R, weight_b_R, total_R, smoothing, K, target_b_ptr is not None
        )
        t_RC = (t_RC - teacher_max_R[:, None]) * coldness - teacher_log_sum_R[:, None]
        c_RC += soft_R[:, None] * tl.exp(t_RC)
        if loss_ptr is not None:
            cross_RC += cross_terms(c_RC, x_RC, column_RC, K)
        if grad_ptr is not None:
            grad_RC = (hard_weight * total_R)[:, None] * tl.exp(x_RC - log_sum_R[:, None]) - c_RC
            grad_RC += soft_R[:, None] * tl.exp(x_RC * coldness - soft_log_sum_R[:, None])
            grad_RC = tl.where((total_R == 0)[:, None], 0.0, scale_R[:, None] * grad_RC)
            store_rows(grad_ptr, grad_RC, row_R, N, chunk, K, BLOCK, GROUP, SHIFTED)

    if loss_ptr is not None:
        loss_R = hard_weight * total_R * log_sum_R + temperature * soft_R * soft_log_sum_R - tl.sum(cross_RC, 1)
        tl.store(loss_ptr + row_R, tl.where(total_R == 0, 0.0, loss_R), mask=row_R < N)


# --------------------------------------------------------------------------------------------------------- launch


def launch_distillation(
    logits_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    target_b_N: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    scale_N: Optional[Tensor],
    scale: float,
    want_loss: bool,
    want_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (N,) float32 and gradient (N, K); the one not wanted comes back empty."""
    logits_NK, teacher_NK = dense_rows(logits_NK), teacher_NK.contiguous()
    num_rows = logits_NK.shape[0]
    loss_N = logits_NK.new_empty(num_rows if want_loss else 0, dtype=torch.float32)
    grad_NK = torch.empty(logits_NK.shape if want_grad else 0, dtype=logits_NK.dtype, device=logits_NK.device)
    if num_rows == 0:  # a grid of 0 programs is an error
        return loss_N, grad_NK
    tile = tile_of_rows(logits_NK, rows_held=2)
    with on_device_of(logits_NK):
        distillation_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            logits_NK,
            teacher_NK,
            target_N.contiguous(),
            None if target_b_N is None else target_b_N.contiguous(),
            lam_N,
            scale_N,
            loss_N if want_loss else None,
            grad_NK if want_grad else None,
            num_rows,
            lam,
            smoothing,
            temperature,
            hard_weight,
            soft_weight,
            scale,
            IGNORE=ignore_index,
            LAM_STRIDE=broadcast_stride(lam_N),
            SCALE_STRIDE=broadcast_stride(scale_N),
            **tile,
        )
    return loss_N, grad_NK


# ----------------------------------------------------------------------------------------------------- custom ops


@torch.library.custom_op(f"{NAMESPACE}::distillation", mutates_args=())
def _forward(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
    temperature: float,
    hard_weight: float,
    soft_weight: float,
) -> Tensor:
    if runs_triton(logits):
        return launch_distillation(
            logits,
            teacher_logits,
            target,
            target_b,
            lam_N,
            lam,
            smoothing,
            ignore_index,
            temperature,
            hard_weight,
            soft_weight,
            None,
            1.0,
            True,
            False,
        )[0]
    if logits.is_cpu:
        _checks.check_lam_values(lam_N)
        ignore_index = _cpu.used_index(target, target_b, logits.shape[1], ignore_index)
    return reference.distillation(
        logits,
        teacher_logits,
        target,
        target_b,
        lam if lam_N is None else lam_N,
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        smoothing=smoothing,
        ignore_index=ignore_index,
    )


@_forward.register_fake
def _(logits, teacher_logits, target, *options) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=reference.wide_dtype(logits.dtype))


@torch.library.custom_op(f"{NAMESPACE}::distillation_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
    temperature: float,
    hard_weight: float,
    soft_weight: float,
) -> Tensor:
    if runs_triton(logits):
        return launch_distillation(
            logits,
            teacher_logits,
            target,
            target_b,
            lam_N,
            lam,
            smoothing,
            ignore_index,
            temperature,
            hard_weight,
            soft_weight,
            grad_loss,
            1.0,
            False,
            True,
        )[1]
    if logits.is_cpu:  # clearing ignored rows costs as much as a softmax: only where there are any
        ignore_index = _cpu.used_index(target, target_b, logits.shape[1], ignore_index)
    return reference.distillation_grad(
        grad_loss,
        logits,
        teacher_logits,
        target,
        target_b,
        lam if lam_N is None else lam_N,
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        smoothing=smoothing,
        ignore_index=ignore_index,
    )


@_backward.register_fake
def _(grad_loss, logits, *options) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(f"{NAMESPACE}::distillation_loss_and_grad", mutates_args=())
def _loss_and_grad(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    target_b: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    smoothing: float,
    ignore_index: Optional[int],
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    scale_N: Optional[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    if runs_triton(logits):
        return launch_distillation(
            logits,
            teacher_logits,
            target,
            target_b,
            lam_N,
            lam,
            smoothing,
            ignore_index,
            temperature,
            hard_weight,
            soft_weight,
            scale_N,
            scale,
            True,
            True,
        )
    loss = _forward(
        logits,
        teacher_logits,
        target,
        target_b,
        lam_N,
        lam,
        smoothing,
        ignore_index,
        temperature,
        hard_weight,
        soft_weight,
    )
    scale_of_N = torch.full_like(loss, scale) if scale_N is None else (scale * scale_N).to(loss.dtype).expand_as(loss)
    return loss, _backward(
        scale_of_N,
        logits,
        teacher_logits,
        target,
        target_b,
        lam_N,
        lam,
        smoothing,
        ignore_index,
        temperature,
        hard_weight,
        soft_weight,
    )


@_loss_and_grad.register_fake
def _(logits, teacher_logits, target, *options) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(logits.shape[0], dtype=reference.wide_dtype(logits.dtype))
    return loss, torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# ------------------------------------------------------------------------------------------------------- autograd


def _save_forward(ctx, inputs, output) -> None:
    logits, teacher_logits, target, target_b, lam_N, *ctx.options = inputs
    ctx.save_for_backward(logits, teacher_logits, target, target_b, lam_N)


def _forward_vjp(ctx, grad_loss: Tensor):
    return _backward(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 10


def _save_backward(ctx, inputs, output) -> None:
    grad_loss, logits, teacher_logits, target, target_b, lam_N, *ctx.options = inputs
    ctx.save_for_backward(grad_loss, logits, teacher_logits, target, target_b, lam_N)


def _backward_vjp(ctx, grad_grad: Tensor):
    """The second derivative: rare, so it is the reference's formula on every device."""
    grad_loss, logits, teacher_logits, target, target_b, lam_N = ctx.saved_tensors
    lam, smoothing, ignore_index, temperature, hard_weight, soft_weight = ctx.options
    return *reference.distillation_grad_vjp(
        grad_grad,
        grad_loss,
        logits,
        teacher_logits,
        target,
        target_b,
        lam if lam_N is None else lam_N,
        temperature=temperature,
        hard_weight=hard_weight,
        soft_weight=soft_weight,
        smoothing=smoothing,
        ignore_index=ignore_index,
    ), *[None] * 10


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
    target_b: Optional[Tensor] = None,
    lam: "Tensor | float | None" = None,
    ignore_index: Optional[int] = -100,
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

    Returns, Raises, Costs: as in `cross_entropy`; backward reads logits and teacher again.

    Source: He et al. 2018 (arXiv:1812.01187), section 5.3; Hinton et al. 2015 (arXiv:1503.02531), section 2. Oracle:
    reference.distillation, and torch.nn.functional.cross_entropy and kl_div in float64.
    """
    lam_N, lam_number = split_lam(lam)
    smoothing = checked_smoothing(logits, target, target_b, lam, smoothing, smoothing_over, reduction)
    _check_teacher(logits, teacher_logits, temperature, hard_weight, soft_weight)
    loss_N = _forward(
        logits,
        teacher_logits.detach(),
        target,
        target_b,
        lam_N,
        lam_number,
        smoothing,
        ignore_index,
        float(temperature),
        float(hard_weight),
        float(soft_weight),
    )
    denominator = mean_weight(target, target_b, lam, ignore_index) if reduction == "mean" else 1
    return reduce_rows(loss_N, reduction, denominator)


def distillation_loss_and_grad(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 20.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    smoothing: float = 0.0,
    target_b: Optional[Tensor] = None,
    lam: "Tensor | float | None" = None,
    ignore_index: Optional[int] = None,
    reduction: Reduction = "mean",
    smoothing_over: SmoothingOver = "all",
    loss_scale: "Tensor | float" = 1.0,
) -> tuple[Tensor, Tensor]:
    """The distillation loss, and the gradient of loss_scale * loss, in one pass: for `logits.backward(grad)`.

    Arguments as in `distillation_loss`; loss_scale, ignore_index, reduction and the result as in
    `cross_entropy_loss_and_grad`.

    Costs: one launch for losses and gradient (3 K elements + 12 bytes a row), one more to sum N numbers.
    """
    lam_N, lam_number = split_lam(lam)
    smoothing = checked_smoothing(logits, target, target_b, lam, smoothing, smoothing_over, reduction)
    _check_teacher(logits, teacher_logits, temperature, hard_weight, soft_weight)
    denominator = mean_weight(target, target_b, lam, ignore_index) if reduction == "mean" else 1
    scale_N, scale = grad_scale(loss_scale, reduction, denominator)
    loss_N, grad = _loss_and_grad(
        logits.detach(),
        teacher_logits.detach(),
        target,
        target_b,
        lam_N,
        lam_number,
        smoothing,
        ignore_index,
        float(temperature),
        float(hard_weight),
        float(soft_weight),
        scale_N,
        scale,
    )
    return reduce_rows(loss_N, reduction, denominator), grad


def _check_teacher(
    logits: Tensor, teacher_logits: Tensor, temperature: float, hard_weight: float, soft_weight: float
) -> None:
    _checks.check_same("teacher_logits", teacher_logits, "logits", logits)
    if teacher_logits.dtype != logits.dtype:
        raise TypeError(f"teacher_logits are {teacher_logits.dtype}, but logits {logits.dtype}; cast the teacher's")
    _checks.check_positive("temperature", temperature)
    _checks.check_weight("hard_weight", hard_weight)
    _checks.check_weight("soft_weight", soft_weight)


class DistillationLoss(torch.nn.Module):
    """`distillation_loss` as a module: loss(logits, teacher_logits, target, target_b=None, lam=None)."""

    def __init__(
        self,
        temperature: float = 20.0,
        hard_weight: float = 1.0,
        soft_weight: float = 1.0,
        *,
        ignore_index: Optional[int] = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        smoothing_over: SmoothingOver = "all",
    ) -> None:
        super().__init__()
        _checks.check_positive("temperature", temperature)
        _checks.check_weight("hard_weight", hard_weight)
        _checks.check_weight("soft_weight", soft_weight)
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
        target_b: Optional[Tensor] = None,
        lam: "Tensor | float | None" = None,
    ) -> Tensor:
        return distillation_loss(logits, teacher_logits, target, target_b=target_b, lam=lam, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
