"""Convolutions that the CPU computes in fewer operations."""

from __future__ import annotations

from torch import Tensor, nn

from fasttricks.models.pool import max_pool
from fasttricks_kernels.convolution import pointwise, winograd

OF_CONV2D = ("resnet", "cifarnet")
"""The networks whose convolutions are Conv2d or Conv2dPool."""


def convolution_arithmetic() -> str:
    """The implementation of convolutions on this CPU: own, or torch where winograd.c cannot be had."""
    return "own" if winograd.compiled() is not None else "torch"


class Conv2d(nn.Conv2d):
    """nn.Conv2d, with its keys. On a CPU, eager and in float32, a 3x3 of stride 1 is winograd.conv3x3, and a 1x1 of stride 1
    pointwise.conv1x1, where those take it.

    They agree within rounding: the error beside float64 is at most torch's (tests/test_models_convolution.py). Under
    torch.compile, export, tracing, torch.func, autocast and modes of Python it is torch's, and so it is on other devices.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_plain(3) and winograd.takes(input, weight):
            return winograd.conv3x3(input, weight)
        if self._is_plain(1) and pointwise.takes(input, weight) and convolution_arithmetic() == "own":
            return pointwise.conv1x1(input, weight)
        out: Tensor = super()._conv_forward(input, weight, bias)
        return out

    def _is_plain(self, side: int) -> bool:
        """Whether it is of this kernel's side and nothing else: the image keeps its size."""
        return (
            self.kernel_size == (side, side)
            and self.stride == self.dilation == (1, 1)
            and self.padding == (side // 2, side // 2)
            and self.groups == 1
            and self.bias is None
            and self.padding_mode == "zeros"
        )


class Conv2dPool(Conv2d):
    """Conv2d, and the maxima of its 2x2 windows: (N, K, H // 2, W // 2).

    Where winograd takes the convolution it is never written whole; else it is max_pool(Conv2d).
    """

    def forward(self, input: Tensor) -> Tensor:
        if self._is_plain(3) and winograd.takes(input, self.weight):
            return winograd.conv3x3_pool(input, self.weight)
        return max_pool(super().forward(input), 2, stride=2)
