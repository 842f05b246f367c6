"""Device code that the losses share: rows in and out in 16-byte accesses, softmax statistics, label weights.

Shape suffixes: R rows of a program, C lanes along a row (lane 0 is column 0, or up to GROUP - 1 before it).
"""

# No `from __future__ import annotations` where Triton code is: the compiler reads tl.constexpr from the annotations.
import triton
import triton.language as tl

from .._launch import INTERPRETED

PTX = tl.constexpr(not INTERPRETED)

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit
def lead_of(row_R, K: tl.constexpr, GROUP: tl.constexpr):
    """Elements from the 16-byte boundary at or before a contiguous row to the row: row * K modulo GROUP, in int32."""
    return (row_R % GROUP) * (K % GROUP) % GROUP


@triton.jit
def columns_of(
    row_R, chunk: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SHIFTED: tl.constexpr
):
    """Column held by each lane, [R, C]; outside [0, K) the lane holds padding."""
    lane_RC = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    if SHIFTED:
        lane_RC = lane_RC - lead_of(row_R, K, GROUP)[:, None]
    return lane_RC


@triton.jit
def shifted_offsets(row_R, chunk: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """SHIFTED rows: offset of each lane from the tensor's start, and whether its group lies in the row as a whole.

    The mask is constant within a group, so a load or store of whole groups stays 16 bytes wide.
    """
    start_R = row_R.to(tl.int64) * K
    lead_R1 = lead_of(row_R, K, GROUP)[:, None]
    lane_1C = (chunk * BLOCK + tl.arange(0, BLOCK))[None, :]
    group_1C = lane_1C // GROUP * GROUP
    whole_RC = (group_1C >= lead_R1) & (group_1C + GROUP <= lead_R1 + K)
    base_R = start_R // GROUP * GROUP  # not start - lead: the compiler must see that it divides
    return base_R[:, None] + lane_1C, whole_RC


@triton.jit
def load_rows(
    rows_ptr,
    row_R,
    N,
    chunk: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """[R, C] values in the rows' dtype, -inf outside the row."""
    live_R1 = (row_R < N)[:, None]
    column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
    inside_RC = (column_RC >= 0) & (column_RC < K) & live_R1
    if SHIFTED:
        offset_RC, whole_RC = shifted_offsets(row_R, chunk, K, BLOCK, GROUP)
        # Whole groups in one wide load, then the at most 2 (GROUP - 1) elements at the row's two ends.
        x_RC = tl.load(rows_ptr + offset_RC, mask=whole_RC & live_R1, other=float("-inf"))
        if chunk == 0 or (chunk + 1) * BLOCK > K:
            x_RC = tl.load(rows_ptr + offset_RC, mask=inside_RC & (whole_RC == 0), other=x_RC)
    else:
        offset_RC = (row_R.to(tl.int64) * STRIDE)[:, None] + column_RC
        x_RC = tl.load(rows_ptr + offset_RC, mask=inside_RC, other=float("-inf"))
    return x_RC


@triton.jit
def packed(x_RC, PACK: tl.constexpr):
    """With PACK, values of 16 bits two to a register, to be held there; others as they are.

    Left to itself the compiler converts once and keeps the float32 for the second use: twice the registers, and spills.
    The move is opaque to it, so that the pair stays in the register.
    """
    if PTX and PACK and x_RC.dtype != tl.float32:
        bits_RC = x_RC.to(tl.int16, bitcast=True)
        bits_RC = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits_RC], dtype=tl.int16, is_pure=True, pack=2)
        x_RC = bits_RC.to(x_RC.dtype, bitcast=True)
    return x_RC


@triton.jit
def unpacked(held_RC, after_R1, PACK: tl.constexpr):
    """The values that packed() kept, as float32, converted again and not before the statistic `after`, at least 0, is known."""
    if PTX and PACK and held_RC.dtype != tl.float32:
        # 0, for no sum of exponentials is -1, which the compiler cannot know: a xor that changes nothing
        zero_RC = tl.broadcast_to((after_R1 == -1.0).to(tl.int16), held_RC.shape)
        bits_RC = tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;",
            "=r,r,r",
            [held_RC.to(tl.int16, bitcast=True), zero_RC],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        held_RC = bits_RC.to(held_RC.dtype, bitcast=True)
    return held_RC.to(tl.float32)


@triton.jit
def store_rows(
    rows_ptr,
    value_RC,
    row_R,
    N,
    chunk: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Write [R, C] float32 values to contiguous rows of K, rounded once to the rows' dtype."""
    live_R1 = (row_R < N)[:, None]
    column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
    inside_RC = (column_RC >= 0) & (column_RC < K) & live_R1
    value_RC = value_RC.to(rows_ptr.dtype.element_ty)
    if SHIFTED:
        offset_RC, whole_RC = shifted_offsets(row_R, chunk, K, BLOCK, GROUP)
        tl.store(rows_ptr + offset_RC, value_RC, mask=whole_RC & live_R1)
        if chunk == 0 or (chunk + 1) * BLOCK > K:
            tl.store(rows_ptr + offset_RC, value_RC, mask=inside_RC & (whole_RC == 0))
    else:
        tl.store(rows_ptr + (row_R.to(tl.int64) * K)[:, None] + column_RC, value_RC, mask=inside_RC)


@triton.jit
def raised_max(max_R, x_RC):
    """The running maximum with x taken in. While it is -inf, 0 stands in: -inf - -inf would be NaN for good."""
    max_R = tl.maximum(max_R, tl.max(x_RC, 1))
    return max_R, tl.where(max_R == float("-inf"), 0.0, max_R)


@triton.jit
def sum_of_exp(sum_R, old_max_R, new_max_R, x_RC, coldness):
    """sum_k exp(coldness (x_k - max)) with x taken in; the earlier sum is rescaled to the new maximum."""
    rescaled_R = sum_R * tl.exp(coldness * (old_max_R - new_max_R))
    return rescaled_R + tl.sum(tl.exp(coldness * (x_RC - new_max_R[:, None])), 1)


@triton.jit
def per_row(values_ptr, default, row_R, N, STRIDE: tl.constexpr):
    """One number a row from an optional tensor: `default` without it, one load a program where its stride is 0."""
    if values_ptr is None:
        return default
    elif STRIDE == 0:
        return tl.load(values_ptr).to(tl.float32)
    else:
        return tl.load(values_ptr + row_R.to(tl.int64) * STRIDE, mask=row_R < N, other=0.0).to(tl.float32)


@triton.jit
def label_and_weight(labels_ptr, share_R, row_R, N, K: tl.constexpr, IGNORE: tl.constexpr):
    """A row's label and its weight: `share`, 0 where it is ignored, NaN where label or share is out of range.

    The NaN makes the row's loss and gradient NaN: an error that shows, without a sync and without a wild read.
    """
    # in 64 bits: an int32 label of -2^31 is not an IGNORE of 2^31, which Triton takes for a uint32
    label_R = tl.load(labels_ptr + row_R, mask=row_R < N, other=0).to(tl.int64)
    good_R = (label_R >= 0) & (label_R < K) & (share_R >= 0) & (share_R <= 1)
    weight_R = tl.where(good_R, share_R, float("nan"))
    if IGNORE is not None:
        weight_R = tl.where(label_R == IGNORE, 0.0, weight_R)
    return label_R.to(tl.int32), weight_R


@triton.jit
def labels_and_weights(target_ptr, target_b_ptr, lam_R, row_R, N, K: tl.constexpr, IGNORE: tl.constexpr):
    """Both labels of a row with their weights, and the weights' sum; without a second label its weight is 0."""
    label_R, weight_R = label_and_weight(target_ptr, lam_R, row_R, N, K, IGNORE)
    label_b_R = label_R
    weight_b_R = tl.zeros_like(weight_R)
    total_R = weight_R
    if target_b_ptr is not None:
        label_b_R, weight_b_R = label_and_weight(target_b_ptr, 1 - lam_R, row_R, N, K, IGNORE)
        total_R = weight_R + weight_b_R
    return label_R, weight_R, label_b_R, weight_b_R, total_R


@triton.jit
def store_label_weight(label_weight_ptr, row_R, total_R, N):
    """A mean's divisor is the sum of these. A row that is NaN for its bad label counts 1, or all gradients would be NaN."""
    if label_weight_ptr is not None:
        tl.store(label_weight_ptr + row_R, tl.where(total_R == total_R, total_R, 1.0), mask=row_R < N)


@triton.jit
def load_weights(weight_ptr, column, K: tl.constexpr):
    """The class weights of columns or labels, in float32; 0 outside [0, K)."""
    return tl.load(weight_ptr + column, mask=(column >= 0) & (column < K), other=0.0).to(tl.float32)


@triton.jit
def labelled(column_RC, label_R, weight_R, label_b_R, weight_b_R, uniform, PAIR: tl.constexpr):
    """The labels' part of the target's distribution: weight * (1 - uniform) at each.

    Labels are found by comparing columns in registers, not by a gather: a bad label reads nothing.
    """
    q_RC = tl.where(column_RC == label_R[:, None], ((1 - uniform) * weight_R)[:, None], 0.0)
    if PAIR:
        q_RC += tl.where(column_RC == label_b_R[:, None], ((1 - uniform) * weight_b_R)[:, None], 0.0)
    return q_RC


@triton.jit
def cross_terms(q_RC, x_RC, column_RC, K: tl.constexpr):
    """q_k x_k of the row's own columns, else 0; tl.where, because a q of 0 times an x of -inf would be NaN."""
    counts_RC = (q_RC != 0) & (column_RC >= 0) & (column_RC < K)
    return tl.where(counts_RC, q_RC * x_RC, 0.0)
