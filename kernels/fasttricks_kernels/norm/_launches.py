"""The launches of batch norm's kernels: how the pixels are cut, and the two directions from their steps.

Shape suffixes: C channels; P parts of a sum.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._launch import PINNED, on_device_of
from ._bits import empty_bits, fits_bits
from ._kernels import (
    gradient_kernel,
    gradient_sums_kernel,
    merge_gradients_kernel,
    merge_statistics_kernel,
    normalise_kernel,
    statistics_kernel,
)
from ._layout import SEGMENT_BYTES, as_pixels, empty_pixels, num_pixels, stride_of

TILE_BYTES = 8192  # of one tensor, at 8 warps: two loads of 16 bytes a lane
FEWEST_ROWS = (
    1024  # of a program: the reads of its channels' numbers stay below 0.5 % of the traffic, its sums below 1 %
)
MOST_PROGRAMS = 2048
SMALL_C, SMALL_P = 16, 64  # a tile of the kernels that add the parts
ACTS = ("none", "relu", "relu6")


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
    return _tiles(x.shape[1], num_pixels(x), x.element_size(), strides)


@functools.lru_cache(maxsize=1024)
def _tiles(num_channels: int, num_rows: int, size: int, strides: tuple[int, ...]) -> Tiles:
    block_c = min(SEGMENT_BYTES // size, triton.next_power_of_2(num_channels))
    block_r = TILE_BYTES // size // block_c
    across = triton.cdiv(num_channels, block_c)
    parts = max(1, min(num_rows // FEWEST_ROWS, MOST_PROGRAMS // across))
    rows = triton.cdiv(triton.cdiv(num_rows, parts), block_r) * block_r
    unit = math.gcd(16, num_channels, *strides)
    constants = {"UNIT": unit, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": 8, **PINNED}
    return Tiles((triton.cdiv(num_rows, rows), across), rows, constants)


def launch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: Tensor | None,
    options: Options,
    want_mask: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, dense and channels-last; its mask, as launch_normalise has it; and numbers (4, C) float32: mean, rstd, scale and shift,
    as merge_statistics_kernel has them. Moves the running statistics in place."""
    numbers_4C = x.new_empty((4, x.shape[1]), dtype=torch.float32)
    parts = launch_statistics(x) if options.training else None
    channel_tensors = running_mean, running_var, momentum, weight, bias
    launch_merge_statistics(x, parts, *channel_tensors, numbers_4C, None, None, options)
    return *launch_normalise(x, residual, numbers_4C, options.act, want_mask), numbers_4C


def launch_statistics(x: Tensor) -> Tensor:
    """Parts (3, P, C) float32, as statistics_kernel has them."""
    num_channels, stride = x.shape[1], stride_of(x)
    tiles = tiles_of(x, stride)
    unit = tiles.constants["UNIT"]
    parts = x.new_empty((3, tiles.grid[0], num_channels), dtype=torch.float32)
    steps = num_channels // unit, stride // unit
    with on_device_of(x):
        statistics_kernel[tiles.grid](x, parts, num_pixels(x), tiles.rows, *steps, **tiles.constants)
    return parts


def launch_merge_statistics(
    x: Tensor,
    parts: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    numbers_4C: Tensor | None,
    total: Tensor | None,
    count: Tensor | None,
    options: Options,
) -> None:
    """Writes `numbers_4C`, or `total` (3 C + 1), from the parts (3, P, C), or from the ranks' (W, 3 C + 1)."""
    num_channels, ranks = x.shape[1], parts is not None and parts.dim() == 2
    rows = 0 if ranks else tiles_of(x).rows
    num_parts, *steps = (0, 0, 0) if parts is None else part_steps(parts, num_channels)
    with on_device_of(x):
        merge_statistics_kernel[(triton.cdiv(num_channels, SMALL_C),)](
            parts,
            running_mean,
            running_var,
            momentum,
            weight,
            bias,
            numbers_4C,
            total,
            count,
            num_pixels(x),
            rows,
            num_channels,
            num_parts,
            *steps,
            options.momentum,
            options.eps,
            RANKS=ranks,
            BLOCK_P=SMALL_P,
            BLOCK_C=SMALL_C,
            **PINNED,
        )


def part_steps(parts: Tensor, num_channels: int) -> tuple[int, int, int]:
    """The number of parts (kinds, P, C), or ranks (W, kinds C + ...); the elements from part to part, and from kind to kind."""
    if parts.dim() == 2:
        return parts.shape[0], parts.shape[1], num_channels
    return parts.shape[1], num_channels, parts.shape[1] * num_channels


def launch_normalise(
    x: Tensor, residual: Tensor | None, numbers_4C: Tensor, act: str, want_mask: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the mask that backward may read, if wanted: bits, or y itself where they do not fill bytes."""
    residual = None if residual is None else as_pixels(residual)
    strides = stride_of(x), x.shape[1] if residual is None else stride_of(residual)
    tiles, y = tiles_of(x, *strides), empty_pixels(x)
    bits = empty_bits(x) if want_mask and fits_bits(x) else None
    unit = tiles.constants["UNIT"]
    steps = [x.shape[1] // unit, *(stride // unit for stride in strides)]
    with on_device_of(x):
        normalise_kernel[tiles.grid](
            x, residual, numbers_4C, y, bits, num_pixels(x), tiles.rows, *steps, ACT=act, **tiles.constants
        )
    return y, (y if bits is None else bits) if want_mask else None


def launch_backward(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    numbers_4C: Tensor,
    options: Options,
    want_x: bool = True,
    want_numbers: bool = True,
    want_residual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, and of a residual where writes_residual(); None where not wanted.

    `grad` and `second` are those of a fork's two outputs, and are added. mask: launch_normalise's; None: that of y computed
    again.
    """
    grad_residual = empty_pixels(x) if writes_residual(mask, second, want_residual) else None
    grads: tuple[Tensor | None, Tensor | None] = (None, None)
    means_2C = x.new_empty((2, x.shape[1]), dtype=torch.float32) if options.training else None
    if want_numbers or grad_residual is not None or options.training:
        parts = launch_gradient_sums(grad, second, x, mask, numbers_4C, grad_residual, options.act)
        grads = launch_merge_gradients(x, parts, numbers_4C, None, means_2C, None, want_numbers)
    grad_x = None
    if want_x:
        grad_x = launch_gradient(grad, second, x, numbers_4C, means_2C, grad_residual, options.act)
    return grad_x, *grads, grad_residual


def launch_gradient_sums(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    numbers_4C: Tensor,
    grad_residual: Tensor | None,
    act: str,
) -> Tensor:
    """Parts (2, P, C) float32, as gradient_sums_kernel has them. Writes `grad_residual`."""
    y, bits = (None, mask) if mask is not None and mask.dtype == torch.uint8 else (mask, None)
    grads, tiles, shape = _gradients(grad, second, x)
    parts = x.new_empty((2, tiles.grid[0], x.shape[1]), dtype=torch.float32)
    with on_device_of(x):
        gradient_sums_kernel[tiles.grid](
            *grads, x, y, bits, numbers_4C, grad_residual, parts, *shape, ACT=act, **tiles.constants
        )
    return parts


def launch_merge_gradients(
    x: Tensor,
    parts: Tensor,
    numbers_4C: Tensor,
    total_2C: Tensor | None,
    means_2C: Tensor | None,
    count: Tensor | None,
    want_numbers: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias; writes `total_2C` and `means_2C`, over `count` values or x's own."""
    num_channels = x.shape[1]
    num_parts, *steps = part_steps(parts, num_channels)
    grads = [x.new_empty(num_channels, dtype=torch.float32) if want_numbers else None for _ in range(2)]
    with on_device_of(x):
        merge_gradients_kernel[(triton.cdiv(num_channels, SMALL_C),)](
            parts,
            numbers_4C,
            *grads,
            total_2C,
            means_2C,
            count,
            num_pixels(x),
            num_channels,
            num_parts,
            *steps,
            BLOCK_P=SMALL_P,
            BLOCK_C=SMALL_C,
            **PINNED,
        )
    return grads[0], grads[1]


def launch_gradient(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    numbers_4C: Tensor,
    means_2C: Tensor | None,
    grad_residual: Tensor | None,
    act: str,
) -> Tensor:
    """The gradient of x, dense and channels-last."""
    if grad_residual is not None:  # its values are added and masked already
        grad, second, act = grad_residual, None, "none"
    grads, tiles, shape = _gradients(grad, second, x)
    grad_x = empty_pixels(x)
    with on_device_of(x):
        gradient_kernel[tiles.grid](*grads, x, numbers_4C, means_2C, grad_x, *shape, ACT=act, **tiles.constants)
    return grad_x


def _gradients(
    grad: Tensor, second: Tensor | None, x: Tensor
) -> tuple[tuple[Tensor, Tensor | None], Tiles, tuple[int, ...]]:
    """Both as pixels, how they are cut, and the arguments from R to x_units."""
    grad, second = as_pixels(grad), None if second is None else as_pixels(second)
    strides = stride_of(grad), x.shape[1] if second is None else stride_of(second), stride_of(x)
    tiles = tiles_of(x, *strides)
    unit = tiles.constants["UNIT"]
    shape = num_pixels(x), tiles.rows, x.shape[1] // unit, *(stride // unit for stride in strides)
    return (grad, second), tiles, shape


def writes_residual(mask: Tensor | None, second: Tensor | None, want_residual: bool) -> bool:
    """Whether backward writes the residual's gradient: it is not the gradient of y as it came."""
    return mask is not None or (want_residual and second is not None)
