"""1x1 convolutions of stride 1 as matrix products, each pass where that is faster: float32, channels-last, on a CPU.

A pixel's channels lie side by side, so that pixels and weights are matrices as they are. oneDNN has the other passes.
Oracle: torch.nn.functional.conv2d in float64.
Shape suffixes: N images, C and K channels of input and output, H rows, W columns; P pixels of all images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ._taken import gradients_by_operator, is_taken, needs_operators


class Products(NamedTuple):
    """The passes that are products; oneDNN has the others."""

    forward: bool
    grad_input: bool
    grad_weight: bool


def products(channels: int, outputs: int) -> Products:
    """Measured over ResNet-50-D's layers, with AVX2 and AVX-512 (docs/convolutions.md)."""
    return Products(_widens(channels, outputs), _widens(outputs, channels), channels >= 256 and outputs >= 64)


def _widens(taken: int, made: int) -> bool:
    """Whether a product of (P, taken) and (taken, made) is faster than oneDNN's."""
    return (taken >= 128 and made >= 2 * taken) or min(taken, made) >= 512


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether conv1x1 takes these: as is_taken has it, and of such sizes that a pass is faster."""
    return is_taken(x, weight) and any(_products(weight))


def _products(weight: Tensor) -> Products:
    outputs, channels = weight.shape[:2]
    return products(channels, outputs)


def conv1x1(x_NCHW: Tensor, weight_KC11: Tensor) -> Tensor:
    """torch.nn.functional.conv2d(x, weight), (N, K, H, W) channels-last, of tensors that takes() takes.

    Differentiable in both, twice; the second derivative is torch's. The number of threads may change the last bits. No memory
    but the results.
    """
    y: Tensor = _Conv1x1.apply(x_NCHW, weight_KC11)
    return y


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution, without autograd."""
    if not _products(weight).forward:
        made: Tensor = F.conv2d(x, weight)
        return made
    return _as_images(_pixels(x) @ weight.flatten(1).t(), x)


def grad_input(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x from that of y, which is channels-last."""
    if not _products(weight).grad_input:
        made: Tensor = gradients_by_operator(grad, x, weight, (True, False))[0]
        return made
    return _as_images(_pixels(grad) @ weight.flatten(1), x)


def grad_weight(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weight, (K, C, 1, 1) of its strides, from x and the gradient of y, which is channels-last."""
    if not _products(weight).grad_weight:
        made: Tensor = gradients_by_operator(grad, x, weight, (False, True))[1]
        return made
    product = _pixels(grad).t() @ _pixels(x)
    # in memory all layouts of a dense 1x1 are one; a gradient of other strides than its weight's would be copied
    return product.as_strided(weight.shape, weight.stride()) if weight.is_contiguous() else product[:, :, None, None]


def _pixels(images: Tensor) -> Tensor:
    """(P, channels), a view."""
    return images.permute(0, 2, 3, 1).view(-1, images.shape[1])


def _as_images(pixels: Tensor, like: Tensor) -> Tensor:
    """(N, channels, H, W) channels-last, a view; N, H and W as in `like`."""
    num_images, _, height, width = like.shape
    return pixels.view(num_images, height, width, -1).movedim(-1, 1)


class _Conv1x1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        if needs_operators(grad):
            return gradients_by_operator(grad, x, weight, ctx.needs_input_grad)
        grad = grad.contiguous(memory_format=torch.channels_last)
        return grad_input(x, weight, grad) if of_x else None, grad_weight(x, weight, grad) if of_weight else None
