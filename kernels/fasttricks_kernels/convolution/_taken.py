"""The calls whose convolutions the project computes itself, and torch's operator for the rest of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._direct import runs_directly

LEAST_VALUES = 131_072
"""Values of x from which it does: with fewer the calls, and Winograd's transform of the weights, cost more than they save."""


def is_measured() -> bool:
    """Whether the CPU is of a kind on which the times were measured."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def is_taken(x: Tensor, weight: Tensor) -> bool:
    """Whether these are eager float32 on the CPU, channels-last and large enough, without autocast or a transform."""
    return (
        isinstance(x, Tensor)
        and x.is_cpu  # first, so that a GPU's step is not held up
        and not torch.jit.is_tracing()
        and runs_directly(x, weight)  # before a size is asked, which an export would take for a rule
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and x.numel() >= LEAST_VALUES
        and x.shape[1] == weight.shape[1]  # else torch has the error
        and not torch.is_autocast_enabled("cpu")
        and x.is_contiguous(memory_format=torch.channels_last)
        and is_measured()
    )


def needs_operators(grad: Tensor) -> bool:
    """Whether backward is to be differentiated again, or runs under a transform."""
    return torch.is_grad_enabled() or not runs_directly(grad)


def gradients_by_operator(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]) -> Any:
    """Gradients of x and the weight, where `wanted`, of a convolution that keeps the image's size; differentiable again."""
    side = weight.shape[2] // 2
    how = [1, 1], [side, side], [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *how, [*wanted, False])[:2]
