"""Max-pooling that keeps less for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def max_pool(x: Tensor, kernel_size: int, stride: int, padding: int = 0) -> Tensor:
    """F.max_pool2d, (N, C, H, W). torch's keeps its input for backward, which reads nothing but its shape: here that is kept.

    After the stem of a ResNet that input is the largest tensor of the network. Under torch.compile, export and tracing it is
    torch's.
    """
    traced = not isinstance(x, Tensor) or torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    if traced or not (torch.is_grad_enabled() and x.requires_grad) or torch._C._are_functorch_transforms_active():
        return F.max_pool2d(x, kernel_size, stride, padding)
    y: Tensor = _MaxPool.apply(x, kernel_size, stride, padding)
    return y


class MaxPool(nn.MaxPool2d):
    """nn.MaxPool2d by max_pool(). kernel_size, stride, padding: one number each."""

    def forward(self, x: Tensor) -> Tensor:
        """As max_pool()."""
        window: Any = self.kernel_size, self.stride, self.padding
        return max_pool(x, *window)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *window: Any) -> Tensor:
        y, chosen = F.max_pool2d_with_indices(x, *window)
        ctx.save_for_backward(chosen)
        format = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        ctx.window, ctx.shape, ctx.format = [[n, n] for n in window], x.shape, format
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (chosen,) = ctx.saved_tensors
        blank = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.format)
        # an operator, and so differentiable again in grad
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(grad, blank, *ctx.window, [1, 1], False, chosen), None, None, None
