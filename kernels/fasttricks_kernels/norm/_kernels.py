"""Batch norm's device code and its launches. Forward reads x for its statistics, and again to write y; backward likewise.

A program takes BLOCK_C channels of ROWS pixels, a number that depends on the shape alone, so that sums have one order. Each
program writes its part of a sum; a small kernel adds the parts. There are no atomics.

Shape suffixes: C channels; in device code R pixels of a tile, C channels of a tile, P parts of a sum.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from annotations.
import math
from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import PINNED, on_device_of
from ._layout import as_pixels, empty_pixels, num_pixels, pixel_stride

TILE_BYTES = 8192  # of one tensor, at 8 warps: two loads of 16 bytes a lane
SEGMENT_BYTES = 128  # of one pixel in a tile: a cache line
FEWEST_ROWS = (
    1024  # of a program: the reads of its channels' numbers stay below 0.5 % of the traffic, its sums below 1 %
)
MOST_PROGRAMS = 2048
SMALL_C, SMALL_P = 16, 64  # a tile of the kernels that add the parts
ACTS = ("none", "relu", "relu6")

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit
def rows_at(first, stop, BLOCK_R: tl.constexpr):
    """Pixels of a tile as a column, int64, and which of them are there."""
    row_R1 = (first + tl.arange(0, BLOCK_R))[:, None]
    return row_R1.to(tl.int64), row_R1 < stop


@triton.jit
def activated(x_RC, mean_1C, scale_1C, bias_1C, residual_RC, ACT: tl.constexpr):
    """act(normalised + residual) in float32. Backward computes it again for the mask, by the same bits."""
    y_RC = (x_RC - mean_1C) * scale_1C + bias_1C + residual_RC
    if ACT != "none":
        y_RC = tl.where(y_RC <= 0, 0.0, y_RC)  # not a maximum, which would drop a NaN
    if ACT == "relu6":
        y_RC = tl.where(y_RC >= 6, 6.0, y_RC)
    return y_RC


@triton.jit
def masked(grad_RC, y_RC, ACT: tl.constexpr):
    """The gradient where the activation was open, judged by its output as stored, in float32."""
    if ACT != "none":
        grad_RC = tl.where(y_RC <= 0, 0.0, grad_RC)
    if ACT == "relu6":
        grad_RC = tl.where(y_RC >= 6, 0.0, grad_RC)
    return grad_RC


@triton.jit
def channel_numbers(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c_1C, live_1C):
    """mean, weight * rstd and bias of a tile's channels."""
    mean_1C = tl.load(mean_ptr + c_1C, mask=live_1C, other=0.0)
    scale_1C = tl.load(rstd_ptr + c_1C, mask=live_1C, other=0.0)
    bias_1C = tl.zeros_like(mean_1C)
    if weight_ptr is not None:
        scale_1C = scale_1C * tl.load(weight_ptr + c_1C, mask=live_1C, other=0.0)
    if bias_ptr is not None:
        bias_1C = tl.load(bias_ptr + c_1C, mask=live_1C, other=0.0)
    return mean_1C, scale_1C, bias_1C


@triton.jit
def gradient_at(grad_ptr, second_ptr, row_R1, c_1C, live_RC, grad_stride, second_stride):
    """A tile of y's gradient in float32, or of the sum of the gradients of y and its second form."""
    grad_RC = tl.load(grad_ptr + (row_R1 * grad_stride + c_1C), mask=live_RC, other=0.0).to(tl.float32)
    if second_ptr is not None:
        grad_RC += tl.load(second_ptr + (row_R1 * second_stride + c_1C), mask=live_RC, other=0.0).to(tl.float32)
    return grad_RC


# Channels and strides come as multiples of UNIT: the compiler then knows that 16 bytes divide them, and accesses are wide.
@triton.jit(do_not_specialize=["R", "ROWS", "C_units", "x_units"])
def statistics_kernel(
    x_ptr, parts_ptr, R, ROWS, C_units, x_units, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean, and sum of squared distances from it, of ROWS pixels: parts (2, P, C).

    The sums are of distances from a pilot, the first tile's mean: plain sums of squares would lose all digits at a mean
    of many standard deviations.
    """
    C = C_units * UNIT
    start = tl.program_id(0) * ROWS
    stop = tl.minimum(start + ROWS, R)
    c_1C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    row_R1, there_R1 = rows_at(start, stop, BLOCK_R)
    x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=there_R1 & live_1C, other=0.0).to(tl.float32)
    pilot_1C = (tl.sum(x_RC, 0) / tl.minimum(stop - start, BLOCK_R).to(tl.float32))[None, :]
    d_RC = tl.where(there_R1, x_RC - pilot_1C, 0.0)
    sum_RC = d_RC
    square_RC = d_RC * d_RC
    for first in range(start + BLOCK_R, stop, BLOCK_R):
        row_R1, there_R1 = rows_at(first, stop, BLOCK_R)
        x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=there_R1 & live_1C, other=0.0).to(tl.float32)
        d_RC = tl.where(there_R1, x_RC - pilot_1C, 0.0)
        sum_RC += d_RC
        square_RC += d_RC * d_RC
    sum_1C = tl.sum(sum_RC, 0)[None, :]
    shift_1C = sum_1C / (stop - start).to(tl.float32)
    part_1C = tl.program_id(0) * C + c_1C
    tl.store(parts_ptr + part_1C, pilot_1C + shift_1C, mask=live_1C)
    square_1C = tl.maximum(tl.sum(square_RC, 0)[None, :] - sum_1C * shift_1C, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(parts_ptr + tl.num_programs(0) * C + part_1C, square_1C, mask=live_1C)


@triton.jit(do_not_specialize=["R", "ROWS", "C", "P"])
def merge_statistics_kernel(
    parts_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    ROWS,
    C,
    P,
    momentum,
    eps,
    TRAINING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and 1 / sqrt(var + eps) from the parts, which also move the running statistics; or, not TRAINING, from those."""
    c_1C = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    if TRAINING:
        first_1C = tl.load(parts_ptr + c_1C, mask=live_1C, other=0.0)
        moved_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, P, BLOCK_P):
            p_P1 = (first + tl.arange(0, BLOCK_P))[:, None]
            mean_PC = tl.load(parts_ptr + (p_P1 * C + c_1C), mask=(p_P1 < P) & live_1C, other=0.0)
            count_P1 = tl.maximum(tl.minimum(R - p_P1 * ROWS, ROWS), 0).to(tl.float32)
            moved_PC += tl.where(p_P1 < P, count_P1 * (mean_PC - first_1C), 0.0)
        count = R.to(tl.float32)
        mean_1C = first_1C + tl.div_rn(tl.sum(moved_PC, 0)[None, :], count)
        square_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, P, BLOCK_P):
            p_P1 = (first + tl.arange(0, BLOCK_P))[:, None]
            live_PC = (p_P1 < P) & live_1C
            d_PC = tl.load(parts_ptr + (p_P1 * C + c_1C), mask=live_PC, other=0.0) - mean_1C
            own_PC = tl.load(parts_ptr + ((P + p_P1) * C + c_1C), mask=live_PC, other=0.0)
            count_P1 = tl.maximum(tl.minimum(R - p_P1 * ROWS, ROWS), 0).to(tl.float32)
            square_PC += tl.where(p_P1 < P, own_PC + count_P1 * d_PC * d_PC, 0.0)
        square_1C = tl.sum(square_PC, 0)[None, :]
        var_1C = tl.div_rn(square_1C, count)
        if running_mean_ptr is not None:
            share = momentum
            if momentum_ptr is not None:
                share = tl.load(momentum_ptr).to(tl.float32)
            old_1C = tl.load(running_mean_ptr + c_1C, mask=live_1C, other=0.0)
            tl.store(running_mean_ptr + c_1C, (1 - share) * old_1C + share * mean_1C, mask=live_1C)
            old_1C = tl.load(running_var_ptr + c_1C, mask=live_1C, other=0.0)
            unbiased_1C = tl.div_rn(square_1C, (R - 1).to(tl.float32))
            tl.store(running_var_ptr + c_1C, (1 - share) * old_1C + share * unbiased_1C, mask=live_1C)
    else:
        mean_1C = tl.load(running_mean_ptr + c_1C, mask=live_1C, other=0.0)
        var_1C = tl.load(running_var_ptr + c_1C, mask=live_1C, other=0.0)
    tl.store(mean_ptr + c_1C, mean_1C, mask=live_1C)
    tl.store(rstd_ptr + c_1C, tl.div_rn(tl.full([1, BLOCK_C], 1.0, tl.float32), tl.sqrt_rn(var_1C + eps)), mask=live_1C)


@triton.jit(do_not_specialize=["R", "ROWS", "C_units", "x_units", "residual_units"])
def normalise_kernel(
    x_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    R,
    ROWS,
    C_units,
    x_units,
    residual_units,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act(weight (x - mean) rstd + bias + residual), rounded once."""
    C = C_units * UNIT
    start = tl.program_id(0) * ROWS
    stop = tl.minimum(start + ROWS, R)
    c_1C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    mean_1C, scale_1C, bias_1C = channel_numbers(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c_1C, live_1C)
    for first in range(start, stop, BLOCK_R):
        row_R1, there_R1 = rows_at(first, stop, BLOCK_R)
        live_RC = there_R1 & live_1C
        x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=live_RC, other=0.0).to(tl.float32)
        residual_RC = 0.0
        if residual_ptr is not None:
            offset_RC = row_R1 * (residual_units * UNIT) + c_1C
            residual_RC = tl.load(residual_ptr + offset_RC, mask=live_RC, other=0.0).to(tl.float32)
        y_RC = activated(x_RC, mean_1C, scale_1C, bias_1C, residual_RC, ACT)
        tl.store(y_ptr + (row_R1 * C + c_1C), y_RC.to(y_ptr.dtype.element_ty), mask=live_RC)


@triton.jit(do_not_specialize=["R", "ROWS", "C_units", "grad_units", "second_units", "x_units"])
def gradient_sums_kernel(
    grad_ptr,
    second_ptr,
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    grad_residual_ptr,
    parts_ptr,
    R,
    ROWS,
    C_units,
    grad_units,
    second_units,
    x_units,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of g and g (x - mean) over ROWS pixels, parts (2, P, C); g, the masked gradient, is written for a residual.

    The mask is of y where it is kept, else of y computed again.
    """
    C = C_units * UNIT
    start = tl.program_id(0) * ROWS
    stop = tl.minimum(start + ROWS, R)
    c_1C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    mean_1C, scale_1C, bias_1C = channel_numbers(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c_1C, live_1C)
    sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    product_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(start, stop, BLOCK_R):
        row_R1, there_R1 = rows_at(first, stop, BLOCK_R)
        live_RC = there_R1 & live_1C
        grad_RC = gradient_at(grad_ptr, second_ptr, row_R1, c_1C, live_RC, grad_units * UNIT, second_units * UNIT)
        x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=live_RC, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y_RC = tl.load(y_ptr + (row_R1 * C + c_1C), mask=live_RC, other=0.0).to(tl.float32)
        else:
            y_RC = activated(x_RC, mean_1C, scale_1C, bias_1C, 0.0, ACT).to(x_ptr.dtype.element_ty).to(tl.float32)
        grad_RC = masked(grad_RC, y_RC, ACT)
        if grad_residual_ptr is not None:
            value_RC = grad_RC.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + (row_R1 * C + c_1C), value_RC, mask=live_RC)
            grad_RC = value_RC.to(tl.float32)  # as the second pass reads it: the mean is of the same values
        sum_RC += grad_RC
        product_RC += tl.where(live_RC, grad_RC * (x_RC - mean_1C), 0.0)
    part_1C = tl.program_id(0) * C + c_1C
    tl.store(parts_ptr + part_1C, tl.sum(sum_RC, 0)[None, :], mask=live_1C)
    tl.store(parts_ptr + tl.num_programs(0) * C + part_1C, tl.sum(product_RC, 0)[None, :], mask=live_1C)


@triton.jit(do_not_specialize=["R", "C", "P"])
def merge_gradients_kernel(
    parts_ptr,
    rstd_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    means_ptr,
    R,
    C,
    P,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of weight and bias, and means (2, C): of g, and of g (x - mean) rstd^2."""
    c_1C = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    sum_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    product_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, P, BLOCK_P):
        p_P1 = (first + tl.arange(0, BLOCK_P))[:, None]
        live_PC = (p_P1 < P) & live_1C
        sum_PC += tl.load(parts_ptr + (p_P1 * C + c_1C), mask=live_PC, other=0.0)
        product_PC += tl.load(parts_ptr + ((P + p_P1) * C + c_1C), mask=live_PC, other=0.0)
    rstd_1C = tl.load(rstd_ptr + c_1C, mask=live_1C, other=0.0)
    sum_1C = tl.sum(sum_PC, 0)[None, :]
    product_1C = tl.sum(product_PC, 0)[None, :] * rstd_1C
    tl.store(grad_bias_ptr + c_1C, sum_1C, mask=live_1C)
    tl.store(grad_weight_ptr + c_1C, product_1C, mask=live_1C)
    count = R.to(tl.float32)
    tl.store(means_ptr + c_1C, tl.div_rn(sum_1C, count), mask=live_1C)
    tl.store(means_ptr + C + c_1C, tl.div_rn(product_1C * rstd_1C, count), mask=live_1C)


@triton.jit(do_not_specialize=["R", "ROWS", "C_units", "grad_units", "second_units", "x_units"])
def gradient_kernel(
    grad_ptr,
    second_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    means_ptr,
    grad_x_ptr,
    R,
    ROWS,
    C_units,
    grad_units,
    second_units,
    x_units,
    ACT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """weight rstd (g - mean(g) - (x - mean) rstd^2 mean(g (x - mean))); without `means`, in evaluation, weight rstd g."""
    C = C_units * UNIT
    start = tl.program_id(0) * ROWS
    stop = tl.minimum(start + ROWS, R)
    c_1C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    mean_1C, scale_1C, bias_1C = channel_numbers(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, c_1C, live_1C)
    if means_ptr is not None:
        mean_grad_1C = tl.load(means_ptr + c_1C, mask=live_1C, other=0.0)
        slope_1C = tl.load(means_ptr + C + c_1C, mask=live_1C, other=0.0)
    for first in range(start, stop, BLOCK_R):
        row_R1, there_R1 = rows_at(first, stop, BLOCK_R)
        live_RC = there_R1 & live_1C
        grad_RC = gradient_at(grad_ptr, second_ptr, row_R1, c_1C, live_RC, grad_units * UNIT, second_units * UNIT)
        x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=live_RC, other=0.0).to(tl.float32)
        y_RC = activated(x_RC, mean_1C, scale_1C, bias_1C, 0.0, ACT).to(x_ptr.dtype.element_ty).to(tl.float32)
        grad_RC = masked(grad_RC, y_RC, ACT)
        if means_ptr is not None:
            grad_RC = grad_RC - mean_grad_1C - (x_RC - mean_1C) * slope_1C
        grad_RC = scale_1C * grad_RC
        tl.store(grad_x_ptr + (row_R1 * C + c_1C), grad_RC.to(grad_x_ptr.dtype.element_ty), mask=live_RC)


# ---------------------------------------------------------------------------------------------------------- launch


class Options(NamedTuple):
    """The arguments of a call that are no tensors."""

    act: str
    training: bool
    momentum: float
    eps: float


class Tiles(NamedTuple):
    """How the pixels and channels are cut, by shape and dtype alone."""

    grid: tuple[int, int]
    rows: int
    constants: dict[str, Any]


def tiles_of(x: Tensor, *strides: int) -> Tiles:
    num_channels, num_rows, size = x.shape[1], num_pixels(x), x.element_size()
    block_c = min(SEGMENT_BYTES // size, triton.next_power_of_2(num_channels))
    block_r = TILE_BYTES // size // block_c
    across = triton.cdiv(num_channels, block_c)
    parts = max(1, min(num_rows // FEWEST_ROWS, MOST_PROGRAMS // across))
    rows = triton.cdiv(triton.cdiv(num_rows, parts), block_r) * block_r
    unit = math.gcd(16, num_channels, *strides)
    constants = {"UNIT": unit, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 8, **PINNED}
    return Tiles((triton.cdiv(num_rows, rows), across), rows, constants)


def stride_of(x: Tensor) -> int:
    stride = pixel_stride(x)
    assert stride is not None
    return stride


def launch_forward(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    residual: Optional[Tensor],
    momentum: Optional[Tensor],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dense and channels-last; mean and 1 / sqrt(var + eps), (C,) float32. Moves the running statistics in place."""
    num_channels, num_rows = x.shape[1], num_pixels(x)
    residual = None if residual is None else as_pixels(residual)
    strides = stride_of(x), num_channels if residual is None else stride_of(residual)
    tiles, y = tiles_of(x, *strides), empty_pixels(x)
    mean_C, rstd_C = (x.new_empty(num_channels, dtype=torch.float32) for _ in range(2))
    unit, parts = tiles.constants["UNIT"], None
    with on_device_of(x):
        if options.training:
            parts = x.new_empty((2, tiles.grid[0], num_channels), dtype=torch.float32)
            statistics_kernel[tiles.grid](
                x, parts, num_rows, tiles.rows, num_channels // unit, strides[0] // unit, **tiles.constants
            )
        merge_statistics_kernel[(triton.cdiv(num_channels, SMALL_C),)](
            parts,
            running_mean,
            running_var,
            momentum,
            mean_C,
            rstd_C,
            num_rows,
            tiles.rows,
            num_channels,
            tiles.grid[0],
            options.momentum,
            options.eps,
            TRAINING=options.training,
            BLOCK_P=SMALL_P,
            BLOCK_C=SMALL_C,
            **PINNED,
        )
        normalise_kernel[tiles.grid](
            x,
            residual,
            mean_C,
            rstd_C,
            weight,
            bias,
            y,
            num_rows,
            tiles.rows,
            num_channels // unit,
            *(stride // unit for stride in strides),
            ACT=options.act,
            **tiles.constants,
        )
    return y, mean_C, rstd_C


def launch_backward(
    grad: Tensor,
    second: Optional[Tensor],
    x: Tensor,
    y: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    mean_C: Tensor,
    rstd_C: Tensor,
    options: Options,
    want_x: bool = True,
    want_numbers: bool = True,
    want_residual: bool = False,
) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of x, weight and bias, and of a residual where writes_residual(); None where not wanted.

    `grad` and `second` are those of a fork's two outputs, and are added.
    """
    num_channels, num_rows = x.shape[1], num_pixels(x)
    grad, second = as_pixels(grad), None if second is None else as_pixels(second)
    strides = stride_of(grad), num_channels if second is None else stride_of(second), stride_of(x)
    tiles = tiles_of(x, *strides)
    unit = tiles.constants["UNIT"]
    channel_tensors = mean_C, rstd_C, weight, bias
    grad_residual = empty_pixels(x) if writes_residual(y, second, want_residual) else None
    grad_x = empty_pixels(x) if want_x else None
    grad_weight_C = grad_bias_C = means_2C = None
    shape = num_rows, tiles.rows, num_channels // unit
    steps = [stride // unit for stride in strides]
    with on_device_of(x):
        if want_numbers or grad_residual is not None or options.training:
            parts = x.new_empty((2, tiles.grid[0], num_channels), dtype=torch.float32)
            gradient_sums_kernel[tiles.grid](
                grad,
                second,
                x,
                y,
                *channel_tensors,
                grad_residual,
                parts,
                *shape,
                *steps,
                ACT=options.act,
                **tiles.constants,
            )
            grad_weight_C, grad_bias_C = (x.new_empty(num_channels, dtype=torch.float32) for _ in range(2))
            means_2C = x.new_empty((2, num_channels), dtype=torch.float32)
            merge_gradients_kernel[(triton.cdiv(num_channels, SMALL_C),)](
                parts,
                rstd_C,
                grad_weight_C,
                grad_bias_C,
                means_2C,
                num_rows,
                num_channels,
                tiles.grid[0],
                BLOCK_P=SMALL_P,
                BLOCK_C=SMALL_C,
                **PINNED,
            )
        if grad_x is not None:
            act = options.act
            if grad_residual is not None:  # its values are added and masked already
                grad, second, steps[0], act = grad_residual, None, num_channels // unit, "none"
            gradient_kernel[tiles.grid](
                grad,
                second,
                x,
                *channel_tensors,
                means_2C if options.training else None,
                grad_x,
                *shape,
                *steps,
                ACT=act,
                **tiles.constants,
            )
    return grad_x, grad_weight_C, grad_bias_C, grad_residual


def writes_residual(y: Optional[Tensor], second: Optional[Tensor], want_residual: bool) -> bool:
    """Whether backward writes the residual's gradient: it is not the gradient of y as it came."""
    return y is not None or (want_residual and second is not None)
