"""3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) in C: float32, channels-last, on a CPU with AVX2 or AVX-512.

It multiplies 16 numbers where the definition multiplies 36. Source: Lavin and Gray 2015 (arXiv:1509.09308), section 4.1.
Oracle: torch.nn.functional.conv2d in float64.
Shape suffixes: N images, C and K channels of input and output, H rows, W columns.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import native
from .._direct import runs_directly

SOURCE = Path(__file__).with_name("winograd.c")
LEAST_VALUES = 131_072
"""Values of x from which it is used: with fewer the weights' transform costs more than it saves."""
CHANNELS = 32
"""Channels of input and output are multiples of this: two vectors of AVX-512."""
LEAST_USED = 0.6
"""Share of the tiles' pixels that are the image's. A side of 3 has 0.56, where oneDNN is faster, and 7 has 0.77."""
BLOCK_BYTES = 800_000  # of a block's transformed input, about half of a core's second cache; half and double are slower
MOST_TILES, ROWS = 96, 6  # of a block, and of a product in winograd.c

_NUMBERS = ("N", "H", "W", "C", "K", "stride_out", "stride_in", "stride_row", "stride_col", "tiles", "scratch_size")
_POINTERS = ("x", "w", "grad", "zeros", "y", "grad_w", "u", "scratch", "sums")


class Job(ctypes.Structure):
    """The argument of winograd.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("flip", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("parts", "next", "joined", "summed")),
        ("phase", ctypes.c_void_p),
    )


Entry = Literal["convolve", "differentiate"]


@functools.cache
def compiled() -> dict[str, Callable[[Job, int], None]] | None:
    """winograd.c's entries, of an argument and a number of threads.

    None where they cannot be had, with a warning, once; and on a CPU without AVX2, where nobody has measured it.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    try:
        library = native.load(SOURCE)
    except native.NativeError as error:
        warnings.warn(
            f"3x3 convolutions on the CPU are slower than they might be: {error}", RuntimeWarning, stacklevel=2
        )
        return None
    return {name: native.entry(library, f"fasttricks_winograd_{name}", Job) for name in get_args(Entry)}


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether conv3x3 takes these: eager float32 on the CPU, channels-last and large enough, and no autocast or transform."""
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
        and _used(x.shape[2]) * _used(x.shape[3]) >= LEAST_USED
        and weight.shape[0] % CHANNELS == weight.shape[1] % CHANNELS == 0
        and compiled() is not None
    )


def _used(side: int) -> float:
    """The share of the pixels of a row of tiles that are the image's."""
    return side / (side + side % 2)


def conv3x3(x_NCHW: Tensor, weight_KC33: Tensor) -> Tensor:
    """torch.nn.functional.conv2d(x, weight, padding=1), (N, K, H, W) channels-last, of tensors that takes() takes.

    Differentiable in both, twice; the second derivative is torch's. A value that is not finite spreads to the 4x4 pixels of
    its tiles, as NaN. Memory: 16 K C values, and for the gradient of the weight as many a thread. The number of
    threads changes the last bits of the gradient of the weight, and no others.
    """
    y: Tensor = _Conv3x3.apply(x_NCHW, weight_KC33)
    return y


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution, without autograd."""
    return _convolve(x, weight, weight.stride(), weight.shape[0], flip=False)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from that of y: the convolution with the flipped and transposed weight."""
    out, of_x, *sides = weight.stride()
    return _convolve(grad, weight, (of_x, out, *sides), weight.shape[1], flip=True)


def grad_weight(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weight, (K, C, 3, 3), channels-last, from x and the gradient of y."""
    (num_images, channels, height, width), outputs = x.shape, grad.shape[1]
    threads, size = torch.get_num_threads(), 16 * MOST_TILES * (channels + outputs)
    made = x.new_empty((outputs, 3, 3, channels))
    tensors = {
        "x": x, "grad": grad, "zeros": x.new_zeros(max(channels, outputs)), "grad_w": made,
        "scratch": x.new_empty(threads * size), "sums": x.new_empty(threads * 16 * outputs * channels),
    }  # fmt: skip
    shape = {"N": num_images, "H": height, "W": width, "C": channels, "K": outputs}
    _call("differentiate", threads, tensors, **shape, tiles=MOST_TILES, scratch_size=size)
    return made.movedim(-1, 1)


def _convolve(x: Tensor, weight: Tensor, strides: tuple[int, ...], outputs: int, *, flip: bool) -> Tensor:
    (num_images, channels, height, width), threads = x.shape, torch.get_num_threads()
    tiles = min(MOST_TILES, max(ROWS, BLOCK_BYTES // (64 * channels) // ROWS * ROWS))
    size = 16 * tiles * (channels + CHANNELS) + CHANNELS
    y = x.new_empty((num_images, height, width, outputs))
    tensors = {
        "x": x, "w": weight, "zeros": x.new_zeros(channels), "y": y, "u": x.new_empty(16 * outputs * channels),
        "scratch": x.new_empty(threads * size),
    }  # fmt: skip
    shape = {"N": num_images, "H": height, "W": width, "C": channels, "K": outputs}
    steps = dict(zip(("stride_out", "stride_in", "stride_row", "stride_col"), strides, strict=True))
    _call("convolve", threads, tensors, **shape, **steps, tiles=tiles, scratch_size=size, flip=flip)
    return y.movedim(-1, 1)


def _call(entry: Entry, threads: int, tensors: dict[str, Tensor], **numbers: int) -> None:
    """`tensors` live as long as their addresses are in use."""
    functions = compiled()
    assert functions is not None
    addresses: dict[str, Any] = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    functions[entry](Job(**numbers, **addresses), threads)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or not runs_directly(grad):  # an operator, and so differentiable again
            wanted = [*ctx.needs_input_grad, False]
            how = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
            return torch.ops.aten.convolution_backward(grad, x, weight, None, *how, wanted)[:2]
        grad = grad.contiguous(memory_format=torch.channels_last)
        needs_x, needs_weight = ctx.needs_input_grad
        return grad_input(grad, weight) if needs_x else None, grad_weight(x, grad) if needs_weight else None
