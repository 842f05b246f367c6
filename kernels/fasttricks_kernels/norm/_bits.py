"""The mask of an output, a bit a value: for the 16 bytes that a lane writes at once one byte, whatever their dtype.

A bit is 1 where the activation passes the gradient; the lowest is the first channel's. A mask is (S, R, B) uint8: segments of
128 bytes of channels, as the programs take them, pixels, and bytes of a pixel's segment. A program's bytes then lie side by
side, however many channels there are. The last segment may end in bytes that nothing writes or reads.

Shape suffixes: S segments; R pixels; B bytes of a pixel and segment; G channels of a byte; C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
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
    """The mask of y, as normalise_kernel has it; the unused bytes are 0."""
    mask_SRB = empty_bits(y)
    num_segments, num_rows, num_bytes = mask_SRB.shape
    lanes_G = torch.arange(WIDEST_BYTES // y.element_size(), device=y.device)
    open_RBG = (~reference.shut(y, act)).movedim(1, -1).reshape(num_rows, -1, len(lanes_G))
    byte_RB = (open_RBG << lanes_G).sum(-1).to(torch.uint8)
    byte_RB = F.pad(byte_RB, (0, num_segments * num_bytes - byte_RB.shape[1]))
    return mask_SRB.copy_(byte_RB.view(num_rows, num_segments, num_bytes).movedim(1, 0))


def as_y(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """An output with this mask, of x's shape and dtype: `mask` itself where it is no bits, else 1 where open and 0 where not."""
    if mask is None or mask.dtype != torch.uint8:
        return mask
    lanes_G = torch.arange(WIDEST_BYTES // x.element_size(), dtype=torch.uint8, device=x.device)
    open_RSBG = (mask.movedim(0, 1).unsqueeze(-1) >> lanes_G) & 1
    num_images, num_channels, *sides = x.shape
    open_RC = open_RSBG.flatten(1)[:, :num_channels]
    return empty_pixels(x).copy_(open_RC.reshape(num_images, *sides, num_channels).movedim(-1, 1))
