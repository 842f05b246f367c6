"""Cross-entropy of (N, K) logits with (N, K) targets, such as probabilities: device code and launch. Both are read once.

Shape suffixes: N samples, K classes; in device code R rows of a program, C lanes along a row.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from annotations.
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import broadcast_stride, on_device_of, tile_of_rows
from ._options import Labels
from ._rows import (
    columns_of,
    cross_terms,
    load_rows,
    load_weights,
    packed,
    per_row,
    raised_max,
    store_rows,
    sum_of_exp,
    unpacked,
)

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit
def weighed(t_RC, column_RC, weight_ptr, uniform, K: tl.constexpr):
    """q_RC: the target, smoothed, by class weights; 0 outside the row."""
    q_RC = (1 - uniform) * t_RC + uniform / K
    if weight_ptr is not None:
        q_RC *= load_weights(weight_ptr, column_RC, K)
    return tl.where((column_RC >= 0) & (column_RC < K), q_RC, 0.0)


@triton.jit(do_not_specialize=["N"])
def dense_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    device_scale_ptr,
    loss_ptr,
    grad_ptr,
    N,
    uniform,
    host_scale,
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
    # Both rows are read here, once, and HELD in registers; only those too long for them are read again below.
    held = ()
    target_held = ()
    total_RC = tl.zeros([ROWS, BLOCK], tl.float32)
    if HELD:
        max_RC = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
            x_RC = packed(load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED), CHUNKS > 1)
            t_RC = packed(load_rows(target_ptr, row_R, N, chunk, K, K, BLOCK, GROUP, SHIFTED), CHUNKS > 1)
            max_RC = tl.maximum(max_RC, x_RC.to(tl.float32))
            total_RC += weighed(t_RC.to(tl.float32), column_RC, weight_ptr, uniform, K)
            held = held + (x_RC,)  # type: ignore[assignment]
            target_held = target_held + (t_RC,)  # type: ignore[assignment]
        max_R = tl.max(max_RC, 1)
        known_R = tl.where((max_R == 0) & (N < 0), -1.0, 0.0)  # always 0, known only when the maximum is
        sum_RC = tl.zeros([ROWS, BLOCK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            sum_RC += tl.exp(unpacked(held[chunk], known_R[:, None], CHUNKS > 1) - max_R[:, None])
        sum_R = tl.sum(sum_RC, 1)
    else:
        max_R = tl.full([ROWS], float("-inf"), tl.float32)
        sum_R = tl.zeros([ROWS], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
            x_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED).to(tl.float32)
            old_max_R = max_R
            max_R, safe_max_R = raised_max(max_R, x_RC)
            sum_R = sum_of_exp(sum_R, old_max_R, safe_max_R, x_RC, 1.0)
            t_RC = load_rows(target_ptr, row_R, N, chunk, K, K, BLOCK, GROUP, SHIFTED).to(tl.float32)
            total_RC += weighed(t_RC, column_RC, weight_ptr, uniform, K)

    total_R = tl.sum(total_RC, 1)
    log_sum_R = tl.log(sum_R)
    cross_RC = tl.zeros([ROWS, BLOCK], tl.float32)
    scale_R = per_row(device_scale_ptr, 1.0, row_R, N, SCALE_STRIDE) * host_scale + tl.zeros([ROWS], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
        if HELD:
            x_RC = unpacked(held[chunk], sum_R[:, None], CHUNKS > 1)
            t_RC = unpacked(target_held[chunk], sum_R[:, None], CHUNKS > 1)
        else:
            x_RC = load_rows(logits_ptr, row_R, N, chunk, K, STRIDE, BLOCK, GROUP, SHIFTED).to(tl.float32)
            t_RC = load_rows(target_ptr, row_R, N, chunk, K, K, BLOCK, GROUP, SHIFTED).to(tl.float32)
        x_RC = x_RC - max_R[:, None]
        q_RC = weighed(t_RC, column_RC, weight_ptr, uniform, K)
        if loss_ptr is not None:
            cross_RC += cross_terms(q_RC, x_RC, column_RC, K)
        if grad_ptr is not None:
            grad_RC = scale_R[:, None] * (total_R[:, None] * tl.exp(x_RC - log_sum_R[:, None]) - q_RC)
            store_rows(grad_ptr, grad_RC, row_R, N, chunk, K, BLOCK, GROUP, SHIFTED)

    if loss_ptr is not None:
        tl.store(loss_ptr + row_R, total_R * log_sum_R - tl.sum(cross_RC, 1), mask=row_R < N)


# ---------------------------------------------------------------------------------------------------------- launch


def launch_dense(
    logits_NK: Tensor,
    labels: Labels,
    device_scale_N: Optional[Tensor] = None,
    host_scale: float = 1.0,
    *,
    want_loss: bool = True,
    want_grad: bool = True,
) -> tuple[Any, Any]:
    """Loss (N,) float32 and gradient (N, K), scaled; None for the one not wanted."""
    logits_NK, target_NK = logits_NK.contiguous(), labels.target.contiguous()
    num_rows = logits_NK.shape[0]
    loss_N = logits_NK.new_empty(num_rows, dtype=torch.float32) if want_loss else None
    grad_NK = logits_NK.new_empty(logits_NK.shape) if want_grad else None
    if num_rows == 0:  # a grid of 0 programs is an error
        return loss_N, grad_NK
    # lanes are cut for the wider of the two
    tile = tile_of_rows(max(logits_NK, target_NK, key=lambda rows: rows.element_size()), rows_held=2)
    if tile["SHIFTED"] and tile["CHUNKS"] == 1:
        tile = {**tile, "maxnreg": 80}  # not told, the assembler aims at 48, and spills
    with on_device_of(logits_NK):
        dense_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            logits_NK,
            target_NK,
            None if labels.weight_K is None else labels.weight_K.contiguous(),
            device_scale_N,
            loss_N,
            grad_NK,
            num_rows,
            labels.uniform,
            host_scale,
            SCALE_STRIDE=broadcast_stride(device_scale_N),
            **tile,
        )
    return loss_N, grad_NK
