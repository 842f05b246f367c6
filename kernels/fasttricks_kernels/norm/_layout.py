"""Channels-last tensors as rows of pixels: from pixel to pixel one stride, which in a slice of channels is the wider tensor's.

Shape suffixes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEGMENT_BYTES = 128  # of one pixel in a tile: a cache line


def pixel_stride(x: Tensor) -> int | None:
    """Elements from one pixel to the next of an (N, C, ...) tensor whose channels lie side by side; None for another layout."""
    shape, strides = x.shape, x.stride()
    num_channels = shape[1]
    if num_channels != 1 and strides[1] != 1:
        return None
    stride, following = None, None
    for axis in (*range(len(shape) - 1, 1, -1), 0):  # from the innermost to the images
        if shape[axis] == 1:
            continue
        if stride is None:
            stride = following = strides[axis]
        elif strides[axis] != following:
            return None
        following = following * shape[axis]
    if stride is None:
        return num_channels
    return stride if stride >= num_channels else None


def stride_of(x: Tensor) -> int:
    """pixel_stride() of one that has it."""
    stride = pixel_stride(x)
    assert stride is not None
    return stride


def empty_pixels(x: Tensor) -> Tensor:
    """New memory of x's shape and dtype, channels-last and dense."""
    num_images, num_channels, *sides = x.shape
    return torch.empty((num_images, *sides, num_channels), dtype=x.dtype, device=x.device).movedim(-1, 1)


def as_pixels(x: Tensor) -> Tensor:
    """x, if pixel_stride() takes it; otherwise a dense channels-last copy."""
    return x if pixel_stride(x) is not None else empty_pixels(x).copy_(x)


def num_pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]
