"""Batch norm's device code. Forward reads x for its statistics, and again to write y; backward likewise.

A program takes BLOCK_C channels of ROWS pixels, a number that depends on the shape alone, so that sums have one order. Each
program writes its part of a sum; a small kernel adds the parts. There are no atomics.

Shape suffixes: C channels; in device code R pixels of a tile, C channels of a tile, B bytes of a tile's mask, P parts of a sum.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from annotations.
import triton
import triton.language as tl


@triton.jit
def rows_at(first, stop, BLOCK_R: tl.constexpr):
    """Pixels of a tile as a column, int64, and which of them are there."""
    row_R1 = (first + tl.arange(0, BLOCK_R))[:, None]
    return row_R1.to(tl.int64), row_R1 < stop


@triton.jit
def activated(x_RC, mean_1C, scale_1C, shift_1C, residual_RC, ACT: tl.constexpr):
    """act(normalised + residual) in float32. Backward computes it again for the mask, by the same bits."""
    y_RC = (x_RC - mean_1C) * scale_1C + shift_1C + residual_RC
    if ACT != "none":
        y_RC = tl.where(y_RC <= 0, 0.0, y_RC)  # not a maximum, which would drop a NaN
    if ACT == "relu6":
        y_RC = tl.where(y_RC >= 6, 6.0, y_RC)
    return y_RC


@triton.jit
def shut(y_RC, ACT: tl.constexpr):
    """Where the activation passes no gradient, judged by its output as stored, in float32. A NaN passes it."""
    shut_RC = y_RC <= 0
    if ACT == "relu6":
        shut_RC = shut_RC | (y_RC >= 6)
    return shut_RC


@triton.jit
def bytes_at(bits_ptr, row_R1, there_R1, R, C, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """The mask's bytes of a tile, (R, B), and which of them are there: one of GROUP channels, as _bits.py lays them.

    A lane that holds 16 bytes of y holds the byte of their mask. The hint, of no two bytes side by side, keeps it there: for
    wider accesses the compiler would send the bytes through shared memory.
    """
    byte_1B = tl.arange(0, BLOCK_C // GROUP)[None, :]
    num_bytes = tl.minimum(C, BLOCK_C) // GROUP
    offset_RB = (tl.program_id(1).to(tl.int64) * R + row_R1) * num_bytes + byte_1B
    return bits_ptr + tl.max_contiguous(offset_RB, [1, 1]), there_R1 & (byte_1B < num_bytes)


@triton.jit
def channel_numbers(numbers_ptr, C, c_1C, live_1C):
    """mean, weight * rstd and the shift of a tile's channels."""
    mean_1C = tl.load(numbers_ptr + c_1C, mask=live_1C, other=0.0)
    scale_1C = tl.load(numbers_ptr + 2 * C + c_1C, mask=live_1C, other=0.0)
    shift_1C = tl.load(numbers_ptr + 3 * C + c_1C, mask=live_1C, other=0.0)
    return mean_1C, scale_1C, shift_1C


@triton.jit
def lost_of_sum(a, b, total):
    """The part of a + b that its rounding, `total`, lacks (Knuth's two-sum)."""
    added = total - a
    return (a - (total - added)) + (b - added)


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
    """The mean of ROWS pixels, the sum of squared distances from it, and the mean's rest beyond its rounding: parts (3, P, C).

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
    mean_1C = pilot_1C + shift_1C
    part_1C = tl.program_id(0) * C + c_1C
    step = tl.num_programs(0) * C
    tl.store(parts_ptr + part_1C, mean_1C, mask=live_1C)
    square_1C = tl.maximum(tl.sum(square_RC, 0)[None, :] - sum_1C * shift_1C, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(parts_ptr + step + part_1C, square_1C, mask=live_1C)
    tl.store(parts_ptr + 2 * step + part_1C, lost_of_sum(pilot_1C, shift_1C, mean_1C), mask=live_1C)


@triton.jit
def values_of_parts(parts_ptr, p_P1, R, ROWS, C, P, part_step, RANKS: tl.constexpr):
    """Values a channel in each part: as a rank says, else of ROWS pixels."""
    if RANKS:
        return tl.load(parts_ptr + (p_P1 * part_step + 3 * C), mask=p_P1 < P, other=0.0)
    else:
        return tl.where(p_P1 < P, tl.maximum(tl.minimum(R - p_P1 * ROWS, ROWS), 0), 0).to(tl.float32)


@triton.jit(do_not_specialize=["R", "ROWS", "C", "P", "part_step", "kind_step"])
def merge_statistics_kernel(
    parts_ptr,
    running_mean_ptr,
    running_var_ptr,
    momentum_ptr,
    weight_ptr,
    bias_ptr,
    numbers_ptr,
    total_ptr,
    count_ptr,
    R,
    ROWS,
    C,
    P,
    part_step,
    kind_step,
    momentum,
    eps,
    RANKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From the parts, numbers (4, C): mean, rstd = 1 / sqrt(var + eps), scale = weight rstd, and the shift. It moves the
    running statistics; without parts, in evaluation, it takes them.

    The shift is the bias, less `scale` times the rest of the mean: nearly equal values would show that.
    With `total_ptr` it writes a part of all the parts instead, and the number of values behind it: (3 C + 1), a rank's.
    Such are the parts with RANKS, some of them perhaps of no values.
    """
    c_1C = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    first_program = tl.program_id(0) == 0
    if parts_ptr is not None:
        count = R.to(tl.float32)
        pivot = 0
        if RANKS:
            count = tl.sum(tl.zeros([BLOCK_P], tl.float32), 0)
            pivot = P - 1
            for first in range(0, P, BLOCK_P):
                p_P = first + tl.arange(0, BLOCK_P)
                count_P = values_of_parts(parts_ptr, p_P, R, ROWS, C, P, part_step, RANKS)
                count += tl.sum(count_P, 0)
                pivot = tl.minimum(pivot, tl.min(tl.where(count_P > 0, p_P, P - 1), 0))
        first_1C = tl.load(parts_ptr + (pivot * part_step + c_1C), mask=live_1C, other=0.0)
        moved_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, P, BLOCK_P):
            p_P1 = (first + tl.arange(0, BLOCK_P))[:, None]
            live_PC = (p_P1 < P) & live_1C
            part_PC = parts_ptr + (p_P1 * part_step + c_1C)
            lost_PC = tl.load(part_PC + 2 * kind_step, mask=live_PC, other=0.0)
            d_PC = (tl.load(part_PC, mask=live_PC, other=0.0) - first_1C) + lost_PC
            count_P1 = values_of_parts(parts_ptr, p_P1, R, ROWS, C, P, part_step, RANKS)
            moved_PC += tl.where(count_P1 > 0, count_P1 * d_PC, 0.0)
        shift_1C = tl.div_rn(tl.sum(moved_PC, 0)[None, :], count)
        mean_1C = first_1C + shift_1C
        lost_1C = lost_of_sum(first_1C, shift_1C, mean_1C)
        square_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, P, BLOCK_P):
            p_P1 = (first + tl.arange(0, BLOCK_P))[:, None]
            live_PC = (p_P1 < P) & live_1C
            part_PC = parts_ptr + (p_P1 * part_step + c_1C)
            lost_PC = tl.load(part_PC + 2 * kind_step, mask=live_PC, other=0.0)
            d_PC = (tl.load(part_PC, mask=live_PC, other=0.0) - mean_1C) + (lost_PC - lost_1C)
            own_PC = tl.load(part_PC + kind_step, mask=live_PC, other=0.0)
            count_P1 = values_of_parts(parts_ptr, p_P1, R, ROWS, C, P, part_step, RANKS)
            square_PC += tl.where(count_P1 > 0, own_PC + count_P1 * d_PC * d_PC, 0.0)
        square_1C = tl.sum(square_PC, 0)[None, :]
        if total_ptr is not None:
            tl.store(total_ptr + c_1C, mean_1C, mask=live_1C)
            tl.store(total_ptr + C + c_1C, square_1C, mask=live_1C)
            tl.store(total_ptr + 2 * C + c_1C, lost_1C, mask=live_1C)
            tl.store(total_ptr + 3 * C, count, mask=first_program)
        var_1C = tl.div_rn(square_1C, count)
        if count_ptr is not None:
            tl.store(count_ptr, count, mask=first_program)
        if running_mean_ptr is not None:
            share = momentum
            if momentum_ptr is not None:
                share = tl.load(momentum_ptr).to(tl.float32)
            moves_1C = live_1C & (tl.zeros_like(mean_1C) + count > 0)
            old_1C = tl.load(running_mean_ptr + c_1C, mask=live_1C, other=0.0)
            tl.store(running_mean_ptr + c_1C, (1 - share) * old_1C + share * mean_1C, mask=moves_1C)
            old_1C = tl.load(running_var_ptr + c_1C, mask=live_1C, other=0.0)
            unbiased_1C = tl.div_rn(square_1C, count - 1)
            tl.store(running_var_ptr + c_1C, (1 - share) * old_1C + share * unbiased_1C, mask=moves_1C)
    else:
        mean_1C = tl.load(running_mean_ptr + c_1C, mask=live_1C, other=0.0)
        var_1C = tl.load(running_var_ptr + c_1C, mask=live_1C, other=0.0)
        lost_1C = tl.zeros_like(mean_1C)
    if numbers_ptr is not None:
        rstd_1C = tl.div_rn(tl.full([1, BLOCK_C], 1.0, tl.float32), tl.sqrt_rn(var_1C + eps))
        scale_1C = rstd_1C
        bias_1C = tl.zeros_like(mean_1C)
        if weight_ptr is not None:
            scale_1C = rstd_1C * tl.load(weight_ptr + c_1C, mask=live_1C, other=0.0)
        if bias_ptr is not None:
            bias_1C = tl.load(bias_ptr + c_1C, mask=live_1C, other=0.0)
        tl.store(numbers_ptr + c_1C, mean_1C, mask=live_1C)
        tl.store(numbers_ptr + C + c_1C, rstd_1C, mask=live_1C)
        tl.store(numbers_ptr + 2 * C + c_1C, scale_1C, mask=live_1C)
        tl.store(numbers_ptr + 3 * C + c_1C, bias_1C - lost_1C * scale_1C, mask=live_1C)


@triton.jit(do_not_specialize=["R", "ROWS", "C_units", "x_units", "residual_units"])
def normalise_kernel(
    x_ptr,
    residual_ptr,
    numbers_ptr,
    y_ptr,
    bits_ptr,
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
    """y = act(weight (x - mean) rstd + bias + residual), rounded once; and its mask, a bit a value, at `bits_ptr`."""
    C = C_units * UNIT
    GROUP: tl.constexpr = 128 // y_ptr.dtype.element_ty.primitive_bitwidth
    start = tl.program_id(0) * ROWS
    stop = tl.minimum(start + ROWS, R)
    c_1C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    mean_1C, scale_1C, shift_1C = channel_numbers(numbers_ptr, C, c_1C, live_1C)
    for first in range(start, stop, BLOCK_R):
        row_R1, there_R1 = rows_at(first, stop, BLOCK_R)
        live_RC = there_R1 & live_1C
        x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=live_RC, other=0.0).to(tl.float32)
        residual_RC = 0.0
        if residual_ptr is not None:
            offset_RC = row_R1 * (residual_units * UNIT) + c_1C
            residual_RC = tl.load(residual_ptr + offset_RC, mask=live_RC, other=0.0).to(tl.float32)
        y_RC = activated(x_RC, mean_1C, scale_1C, shift_1C, residual_RC, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (row_R1 * C + c_1C), y_RC, mask=live_RC)
        if bits_ptr is not None:
            open_RC = tl.where(shut(y_RC.to(tl.float32), ACT), 0, 1)
            open_RBg = tl.reshape(open_RC, [BLOCK_R, BLOCK_C // GROUP, GROUP])
            byte_RB = tl.sum(open_RBg << tl.arange(0, GROUP)[None, None, :], 2).to(tl.uint8)
            at_RB, live_RB = bytes_at(bits_ptr, row_R1, there_R1, R, C, BLOCK_C, GROUP)
            tl.store(at_RB, byte_RB, mask=live_RB)


@triton.jit(do_not_specialize=["R", "ROWS", "C_units", "grad_units", "second_units", "x_units"])
def gradient_sums_kernel(
    grad_ptr,
    second_ptr,
    x_ptr,
    y_ptr,
    bits_ptr,
    numbers_ptr,
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

    The mask is that of normalise_kernel or of y where one is kept, else of y computed again.
    """
    C = C_units * UNIT
    GROUP: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    start = tl.program_id(0) * ROWS
    stop = tl.minimum(start + ROWS, R)
    c_1C = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    mean_1C, scale_1C, shift_1C = channel_numbers(numbers_ptr, C, c_1C, live_1C)
    sum_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    product_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(start, stop, BLOCK_R):
        row_R1, there_R1 = rows_at(first, stop, BLOCK_R)
        live_RC = there_R1 & live_1C
        grad_RC = gradient_at(grad_ptr, second_ptr, row_R1, c_1C, live_RC, grad_units * UNIT, second_units * UNIT)
        x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=live_RC, other=0.0).to(tl.float32)
        if bits_ptr is not None:
            at_RB, live_RB = bytes_at(bits_ptr, row_R1, there_R1, R, C, BLOCK_C, GROUP)
            byte_RB = tl.load(at_RB, mask=live_RB, other=0).to(tl.int32)
            open_RBg = (byte_RB[:, :, None] >> tl.arange(0, GROUP)[None, None, :]) & 1
            grad_RC = tl.where(tl.reshape(open_RBg, [BLOCK_R, BLOCK_C]) != 0, grad_RC, 0.0)
        elif ACT != "none":
            if y_ptr is not None:
                y_RC = tl.load(y_ptr + (row_R1 * C + c_1C), mask=live_RC, other=0.0).to(tl.float32)
            else:
                y_RC = activated(x_RC, mean_1C, scale_1C, shift_1C, 0.0, ACT).to(x_ptr.dtype.element_ty).to(tl.float32)
            grad_RC = tl.where(shut(y_RC, ACT), 0.0, grad_RC)
        if grad_residual_ptr is not None:
            value_RC = grad_RC.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + (row_R1 * C + c_1C), value_RC, mask=live_RC)
            grad_RC = value_RC.to(tl.float32)  # as the second pass reads it: the mean is of the same values
        sum_RC += grad_RC
        product_RC += tl.where(live_RC, grad_RC * (x_RC - mean_1C), 0.0)
    part_1C = tl.program_id(0) * C + c_1C
    tl.store(parts_ptr + part_1C, tl.sum(sum_RC, 0)[None, :], mask=live_1C)
    tl.store(parts_ptr + tl.num_programs(0) * C + part_1C, tl.sum(product_RC, 0)[None, :], mask=live_1C)


@triton.jit(do_not_specialize=["R", "C", "P", "part_step", "kind_step"])
def merge_gradients_kernel(
    parts_ptr,
    numbers_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    total_ptr,
    means_ptr,
    count_ptr,
    R,
    C,
    P,
    part_step,
    kind_step,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Those that are wanted among the gradients of weight and bias; the sums, total (2, C); and means (2, C),
    of g and of g (x - mean) rstd^2, over R values or the number at `count_ptr`."""
    c_1C = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live_1C = c_1C < C
    sum_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    product_PC = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, P, BLOCK_P):
        p_P1 = (first + tl.arange(0, BLOCK_P))[:, None]
        live_PC = (p_P1 < P) & live_1C
        part_PC = parts_ptr + (p_P1 * part_step + c_1C)
        sum_PC += tl.load(part_PC, mask=live_PC, other=0.0)
        product_PC += tl.load(part_PC + kind_step, mask=live_PC, other=0.0)
    rstd_1C = tl.load(numbers_ptr + C + c_1C, mask=live_1C, other=0.0)
    sum_1C = tl.sum(sum_PC, 0)[None, :]
    product_1C = tl.sum(product_PC, 0)[None, :]
    if grad_weight_ptr is not None:
        tl.store(grad_bias_ptr + c_1C, sum_1C, mask=live_1C)
        tl.store(grad_weight_ptr + c_1C, product_1C * rstd_1C, mask=live_1C)
    if total_ptr is not None:
        tl.store(total_ptr + c_1C, sum_1C, mask=live_1C)
        tl.store(total_ptr + C + c_1C, product_1C, mask=live_1C)
    if means_ptr is not None:
        count = R.to(tl.float32)
        if count_ptr is not None:
            count = tl.load(count_ptr)
        tl.store(means_ptr + c_1C, tl.div_rn(sum_1C, count), mask=live_1C)
        tl.store(means_ptr + C + c_1C, tl.div_rn(product_1C * rstd_1C * rstd_1C, count), mask=live_1C)


@triton.jit(do_not_specialize=["R", "ROWS", "C_units", "grad_units", "second_units", "x_units"])
def gradient_kernel(
    grad_ptr,
    second_ptr,
    x_ptr,
    numbers_ptr,
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
    mean_1C, scale_1C, shift_1C = channel_numbers(numbers_ptr, C, c_1C, live_1C)
    if means_ptr is not None:
        mean_grad_1C = tl.load(means_ptr + c_1C, mask=live_1C, other=0.0)
        slope_1C = tl.load(means_ptr + C + c_1C, mask=live_1C, other=0.0)
    for first in range(start, stop, BLOCK_R):
        row_R1, there_R1 = rows_at(first, stop, BLOCK_R)
        live_RC = there_R1 & live_1C
        grad_RC = gradient_at(grad_ptr, second_ptr, row_R1, c_1C, live_RC, grad_units * UNIT, second_units * UNIT)
        x_RC = tl.load(x_ptr + (row_R1 * (x_units * UNIT) + c_1C), mask=live_RC, other=0.0).to(tl.float32)
        if ACT != "none":
            y_RC = activated(x_RC, mean_1C, scale_1C, shift_1C, 0.0, ACT).to(x_ptr.dtype.element_ty).to(tl.float32)
            grad_RC = tl.where(shut(y_RC, ACT), 0.0, grad_RC)
        if means_ptr is not None:
            grad_RC = grad_RC - mean_grad_1C - (x_RC - mean_1C) * slope_1C
        grad_RC = scale_1C * grad_RC
        tl.store(grad_x_ptr + (row_R1 * C + c_1C), grad_RC.to(grad_x_ptr.dtype.element_ty), mask=live_RC)
