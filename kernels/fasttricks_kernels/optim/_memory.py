"""How a tensor lies in memory: the kernels take a parameter as one run of elements, in any order of its dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one run of memory, each once, in some order of its dimensions."""
    if tensor.layout != torch.strided:
        return False
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return True  # as nearly all are
    expected = 1
    for stride, size in sorted((b, a) for a, b in zip(tensor.shape, tensor.stride(), strict=True) if a != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def lies_like(tensor: Tensor, other: Tensor) -> bool:
    """Whether both have one shape, and each element the same offset; the stride of a single element is none."""
    shape = tensor.shape
    if shape != other.shape or tensor.layout is not other.layout:
        return False
    strides, others = tensor.stride(), other.stride()
    return strides == others or all(size == 1 or a == b for size, a, b in zip(shape, strides, others, strict=True))


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the memory order of a dense `other` of its shape; copied only where it has another, or is sparse."""
    if lies_like(tensor, other) or tensor.shape != other.shape:
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype, device=tensor.device).copy_(tensor.to_dense())
