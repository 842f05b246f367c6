"""The losses' device code and its launch: one kernel each, for forward, backward and both; unused outputs are
compiled away.

Shape suffixes: N samples, K classes; in device code R rows of a program, C lanes along a row.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from annotations.
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import broadcast_stride, dense_rows, on_device_of, tile_of_rows
from ._dense import launch_dense
from ._options import Labels, Weights
from ._planes import launch_planes
from ._rows import (
    columns_of,
    cross_terms,
    labelled,
    labels_and_weights,
    load_rows,
    load_weights,
    packed,
    per_row,
    raised_max,
    store_label_weight,
    store_rows,
    sum_of_exp,
    unpacked,
)

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit(do_not_specialize=["N"])
def cross_entropy_kernel(
    logits_ptr,
    target_ptr,
    target_b_ptr,
    lam_ptr,
    device_scale_ptr,
    loss_ptr,
    grad_ptr,
    label_weight_ptr,
    N,
    lam,
    uniform,
    host_scale,
    weight_ptr,
    SPREAD: tl.constexpr,
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

    SPREAD: there are class weights, and smoothing, which needs all of them; without it a row needs its labels' alone.
    """
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lam_R = per_row(lam_ptr, lam, row_R, N, LAM_STRIDE) + tl.zeros([ROWS], tl.float32)
    label_R, weight_R, label_b_R, weight_b_R, kept_R = labels_and_weights(
        target_ptr, target_b_ptr, lam_R, row_R, N, K, IGNORE
    )
    total_R = kept_R
    if weight_ptr is not None:
        weight_R *= load_weights(weight_ptr, tl.where(row_R < N, label_R, -1), K)
        total_R = weight_R
        if target_b_ptr is not None:
            weight_b_R *= load_weights(weight_ptr, tl.where(row_R < N, label_b_R, -1), K)
            total_R = weight_R + weight_b_R
    store_label_weight(label_weight_ptr, row_R, total_R, N)
    if SPREAD:
        weights_RC = tl.zeros([ROWS, BLOCK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            weights_RC += load_weights(weight_ptr, columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED), K)
        total_R = (1 - uniform) * total_R + uniform / K * kept_R * tl.sum(weights_RC, 1)

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
    scale_R = per_row(device_scale_ptr, 1.0, row_R, N, SCALE_STRIDE) * host_scale + tl.zeros([ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if HELD:
            x_RC = unpacked(held[chunk], sum_exp_R[:, None], True)
        else:
            x_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED).to(tl.float32)
        x_RC = x_RC - max_R[:, None]
        column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
        q_RC = labelled(column_RC, label_R, weight_R, label_b_R, weight_b_R, uniform, target_b_ptr is not None)
        if SPREAD:
            if CHUNKS > 1:  # not before the sum is known, or the weights fill the registers: plus 0, for no sum is -1
                column_RC = column_RC + (sum_exp_R == -1.0).to(tl.int32)[:, None]
            q_RC += (uniform / K * kept_R)[:, None] * load_weights(weight_ptr, column_RC, K)
        elif weight_ptr is None:
            q_RC += (uniform / K * kept_R)[:, None]
        if loss_ptr is not None:
            cross_RC += cross_terms(q_RC, x_RC, column_RC, K)
        if grad_ptr is not None:
            grad_RC = scale_R[:, None] * (total_R[:, None] * tl.exp(x_RC - log_sum_R[:, None]) - q_RC)
            grad_RC = tl.where((kept_R == 0)[:, None], 0.0, grad_RC)
            store_rows(grad_ptr, grad_RC, row_R, N, chunk, K, BLOCK, GROUP, SHIFTED)

    if loss_ptr is not None:
        loss_R = tl.where(kept_R == 0, 0.0, total_R * log_sum_R - tl.sum(cross_RC, 1))
        tl.store(loss_ptr + row_R, loss_R, mask=row_R < N)


@triton.jit(do_not_specialize=["N"])
def distillation_kernel(
    logits_ptr,
    teacher_ptr,
    target_ptr,
    target_b_ptr,
    lam_ptr,
    device_scale_ptr,
    loss_ptr,
    grad_ptr,
    label_weight_ptr,
    N,
    lam,
    uniform,
    temperature,
    hard_weight,
    soft_weight,
    host_scale,
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
            x_RC = unpacked(held[chunk], known_R[:, None], CHUNKS > 1) - max_R[:, None]
            sum_RC += tl.exp(x_RC)
            soft_sum_RC += tl.exp(coldness * x_RC)
            t_RC = unpacked(teacher_held[chunk], known_R[:, None], CHUNKS > 1) - teacher_max_R[:, None]
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
    store_label_weight(label_weight_ptr, row_R, total_R, N)
    sums_R = sum_R + soft_sum_R + teacher_sum_R

    log_sum_R = tl.log(sum_R)
    soft_log_sum_R = tl.log(soft_sum_R)
    teacher_log_sum_R = tl.log(teacher_sum_R)
    soft_R = soft_weight * temperature * total_R
    cross_RC = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_R = per_row(device_scale_ptr, 1.0, row_R, N, SCALE_STRIDE) * host_scale + tl.zeros([ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if HELD:
            x_RC = unpacked(held[chunk], sums_R[:, None], CHUNKS > 1)
            t_RC = unpacked(teacher_held[chunk], sums_R[:, None], CHUNKS > 1)
        else:
            x_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED).to(tl.float32)
            t_RC = load_rows(teacher_ptr, row_R, N, chunk, K, K, BLOCK, GROUP, SHIFTED).to(tl.float32)
        x_RC = x_RC - max_R[:, None]
        column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
        c_RC = labelled(column_RC, label_R, weight_R, label_b_R, weight_b_R, uniform, target_b_ptr is not None)
        c_RC = hard_weight * (c_RC + (uniform / K * total_R)[:, None])
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


# ---------------------------------------------------------------------------------------------------------- launch


def launch_cross_entropy(logits_NK: Tensor, labels: Labels, *scale: Any, **wanted: Any) -> tuple[Any, Any]:
    """As `_launch`; for dense targets as `launch_dense`, for (N, K, P) logits as `launch_planes`."""
    if labels.dense:
        wanted.pop("label_weight_N", None)  # never wanted: each row has its own targets' weight
        return launch_dense(logits_NK, labels, *scale, **wanted)
    if logits_NK.dim() == 3:
        return launch_planes(logits_NK, labels, *scale, **wanted)
    weight_K = None if labels.weight_K is None else labels.weight_K.contiguous()
    options = {"weight_ptr": weight_K, "SPREAD": weight_K is not None and labels.uniform != 0}
    return _launch(cross_entropy_kernel, (dense_rows(logits_NK),), labels, (), *scale, options=options, **wanted)


def launch_distillation(
    logits_NK: Tensor, teacher_NK: Tensor, labels: Labels, weights: Weights, *scale: Any, **wanted: Any
) -> tuple[Any, Any]:
    """As `_launch`."""
    rows = dense_rows(logits_NK), teacher_NK.contiguous()
    return _launch(distillation_kernel, rows, labels, weights, *scale, **wanted)


def _with_class_weights(tile: dict[str, Any]) -> dict[str, Any]:
    """Room for a row's class weights, without which programs spill: more registers, and long rows read twice in place of held."""
    if tile["CHUNKS"] == 1:
        return {**tile, "maxnreg": 96} if tile["maxnreg"] else tile
    chunks = triton.cdiv(tile["K"] + (tile["GROUP"] - 1) * tile["SHIFTED"], 2048)
    registers = {"num_warps": 8, "maxnreg": 255} if tile["GROUP"] == 8 else {"num_warps": 16, "maxnreg": None}
    return {**tile, "BLOCK": 2048, "CHUNKS": chunks, "HELD": False, **registers}


def _launch(
    kernel: Any,
    rows: tuple[Tensor, ...],
    labels: Labels,
    numbers: tuple[float, ...],
    device_scale_N: Optional[Tensor] = None,
    host_scale: float = 1.0,
    *,
    want_loss: bool = True,
    want_grad: bool = True,
    label_weight_N: Optional[Tensor] = None,
    options: Optional[dict[str, Any]] = None,
) -> tuple[Any, Any]:
    """Loss (N,) float32 and gradient (N, K), scaled; None for the one not wanted. rows: logits, and a teacher's.

    label_weight_N: float32, where the weight of a row's labels is wanted too.
    """
    logits_NK = rows[0]
    num_rows = logits_NK.shape[0]
    loss_N = logits_NK.new_empty(num_rows, dtype=torch.float32) if want_loss else None
    grad_NK = logits_NK.new_empty(logits_NK.shape) if want_grad else None
    if num_rows == 0:  # a grid of 0 programs is an error
        return loss_N, grad_NK
    tile = tile_of_rows(logits_NK, rows_held=len(rows))
    if options and options["SPREAD"]:
        tile = _with_class_weights(tile)
    with on_device_of(logits_NK):
        kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            *rows,
            labels.target.contiguous(),
            None if labels.target_b is None else labels.target_b.contiguous(),
            labels.lam_N,
            device_scale_N,
            loss_N,
            grad_NK,
            label_weight_N,
            num_rows,
            labels.lam,
            labels.uniform,
            *numbers,
            host_scale,
            **(options or {}),
            IGNORE=labels.ignore_index,
            LAM_STRIDE=broadcast_stride(labels.lam_N),
            SCALE_STRIDE=broadcast_stride(device_scale_N),
            **tile,
        )
    return loss_N, grad_NK
