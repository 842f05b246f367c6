"""The mask of an output, a bit a value: for the 16 bytes that a lane writes at once one byte, whatever their dtype.

A bit is 1 where the activation passes the gradient, the first channel's the lowest. (B, R, K) uint8: as the programs write them,
B blocks of 128 bytes of channels, R pixels, and K bytes a pixel and block. A program's bytes then lie side by side, also of
many channels; the last block may end in bytes that nothing writes.

Shape suffixes: B, R, K as above; G channels of a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._launch import WIDEST_BYTES
from ._layout import SEGMENT_BYTES, empty_pixels, num_pixels


def fits_bits(x: Tensor) -> bool:
    """Whether x's channels fill whole bytes. The mask of others is their y."""
    return x.shape[1] * x.element_size() % WIDEST_BYTES == 0


def empty_bits(x: Tensor) -> Tensor:
    """New memory for the mask of an output of x's shape and dtype."""
    num_bytes = x.shape[1] * x.element_size()
    shape = -(-num_bytes // SEGMENT_BYTES), num_pixels(x), min(num_bytes, SEGMENT_BYTES) // WIDEST_BYTES
    return x.new_empty(shape, dtype=torch.uint8)


def packed(y: Tensor, act: str) -> Tensor:
    """The mask of y, as normalise_kernel has it."""
    bits, size = empty_bits(y), y.element_size()
    num_blocks, num_rows, num_bytes = bits.shape
    shut = (y <= 0) if act == "relu" else (y <= 0) | (y >= 6)
    open_RC = (~shut).movedim(1, -1).reshape(num_rows, -1)
    lanes_G = torch.arange(WIDEST_BYTES // size, device=y.device)
    byte_Rk = (open_RC.view(num_rows, -1, len(lanes_G)) << lanes_G).sum(-1).to(torch.uint8)
    byte_Rk = torch.nn.functional.pad(byte_Rk, (0, num_blocks * num_bytes - byte_Rk.shape[1]))
    return bits.copy_(byte_Rk.view(num_rows, num_blocks, num_bytes).movedim(1, 0))


def as_y(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """An output with this mask, of x's shape and dtype: `mask` itself where it is no bits, else 1 where open and 0 where not."""
    if mask is None or mask.dtype != torch.uint8:
        return mask
    lanes_G = torch.arange(WIDEST_BYTES // x.element_size(), dtype=torch.uint8, device=x.device)
    open_RBKG = (mask.movedim(0, 1).unsqueeze(-1) >> lanes_G) & 1
    open_RC = open_RBKG.reshape(num_pixels(x), -1)[:, : x.shape[1]]
    num_images, num_channels, *sides = x.shape
    return empty_pixels(x).copy_(open_RC.reshape(num_images, *sides, num_channels).movedim(-1, 1))
