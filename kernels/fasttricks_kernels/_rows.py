"""Device code that the losses share: rows in and out in 16-byte accesses, softmax statistics, label weights.

Shape suffixes: R rows of a program, C lanes along a row (lane 0 is column 0, or up to GROUP - 1 before it).
"""

# No `from __future__ import annotations` where Triton code is: the compiler reads tl.constexpr from the annotations.
import triton
import triton.language as tl


@triton.jit
def columns_of(row_R, chunk: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
               SHIFTED: tl.constexpr):
    """Column held by each lane, [R, C]; outside [0, K) the lane holds padding, or a neighbour's element."""
    lane_RC = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    if SHIFTED:
        lane_RC = lane_RC - ((row_R.to(tl.int64) * K) % GROUP).to(tl.int32)[:, None]
    return lane_RC


@triton.jit
def load_rows(rows_ptr, row_R, N, chunk: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
              GROUP: tl.constexpr, SHIFTED: tl.constexpr):
    """[R, C] values as float32, -inf outside the row.

    SHIFTED: loads start at the 16-byte boundary at or before the row and take whole groups, neighbours' elements
    included, because a mask that changes within a group would narrow every load to one element. Only the last row
    takes the exact mask: after it the tensor ends.
    """
    column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
    inside_RC = (column_RC >= 0) & (column_RC < K) & (row_R < N)[:, None]
    start_R = row_R.to(tl.int64) * STRIDE
    if SHIFTED:
        lead_R = start_R % GROUP
        lane_C = chunk * BLOCK + tl.arange(0, BLOCK)
        pointer_RC = rows_ptr + (start_R // GROUP * GROUP)[:, None] + lane_C[None, :]
        if tl.max(row_R, 0) >= N - 1:
            x_RC = tl.load(pointer_RC, mask=inside_RC, other=0.0)
        else:
            group_C = lane_C // GROUP * GROUP
            x_RC = tl.load(pointer_RC, mask=group_C[None, :] < (lead_R + K)[:, None], other=0.0)
    else:
        x_RC = tl.load(rows_ptr + start_R[:, None] + column_RC, mask=inside_RC, other=0.0)
    return tl.where(inside_RC, x_RC.to(tl.float32), float("-inf"))


@triton.jit
def store_rows(rows_ptr, value_RC, row_R, N, chunk: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
               GROUP: tl.constexpr, SHIFTED: tl.constexpr):
    """Write [R, C] float32 values to contiguous rows of K, rounded once to the rows' dtype."""
    column_RC = columns_of(row_R, chunk, K, BLOCK, GROUP, SHIFTED)
    inside_RC = (column_RC >= 0) & (column_RC < K) & (row_R < N)[:, None]
    start_R = row_R.to(tl.int64) * K
    value_RC = value_RC.to(rows_ptr.dtype.element_ty)
    if SHIFTED:  # whole groups in one wide store, then the at most 2 (GROUP - 1) elements at the row's two ends
        lead_R1 = (start_R % GROUP)[:, None]
        lane_1C = (chunk * BLOCK + tl.arange(0, BLOCK))[None, :]
        group_1C = lane_1C // GROUP * GROUP
        whole_RC = (group_1C >= lead_R1) & (group_1C + GROUP <= lead_R1 + K)
        pointer_RC = rows_ptr + (start_R // GROUP * GROUP)[:, None] + lane_1C
        tl.store(pointer_RC, value_RC, mask=whole_RC)
        tl.store(pointer_RC, value_RC, mask=inside_RC & (whole_RC == 0))
    else:
        tl.store(rows_ptr + start_R[:, None] + column_RC, value_RC, mask=inside_RC)


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
    label_R = tl.load(labels_ptr + row_R, mask=row_R < N, other=0)
    good_R = (label_R >= 0) & (label_R < K) & (share_R >= 0) & (share_R <= 1)
    weight_R = tl.where(good_R, share_R, float("nan"))
    if IGNORE is not None:
        weight_R = tl.where(label_R == IGNORE, 0.0, weight_R)
    return label_R, weight_R


@triton.jit
def weighted_pick(x_RC, column_RC, label_R, weight_R):
    """weight * x[label], by comparing columns in registers: a bad label reads nothing. 0 where the weight is 0."""
    picked_R = tl.sum(tl.where(column_RC == label_R[:, None], x_RC, 0.0), 1)
    return tl.where(weight_R == 0, 0.0, weight_R * picked_R)
