"""3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) in C: float32, channels-last, on a CPU with AVX2 or AVX-512.

It multiplies 16 numbers where the definition multiplies 36. Source: Lavin and Gray 2015 (arXiv:1509.09308), section 4.1.
A maximum over 2x2 windows is taken before the convolution is written. Oracles: torch.nn.functional.conv2d and max_pool2d in
float64.
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
from torch.nn import functional as F

from .. import native
from ._taken import gradients_by_operator, is_measured, is_taken, needs_operators

SOURCE = Path(__file__).with_name("winograd.c")
CHANNELS, FEWEST_CHANNELS = 8, 24
"""Channels of input and output are multiples of the first, half a vector of AVX-512, and the second or more: 16 are slower."""
PANEL = 32  # the most channels of a product's columns in winograd.c, which its memory is rounded up to
WEIGHTS_A_PIXEL = 64
"""Channels of input times output, to a pixel of all images, up to which all passes are faster than oneDNN's. Above, with 512
channels on 7 x 7, the gradient of the weight takes 1.1 to 2.2 of oneDNN's time, and with AVX-512 the others 1.1 to 1.6."""
LEAST_USED = 0.6
"""Share of the tiles' pixels that are the image's. A side of 3 has 0.56, where oneDNN is faster, and 7 has 0.77."""
BLOCK_BYTES = 800_000  # of a block's transformed input, about half of a core's second cache; half and double are slower
MOST_TILES, ROWS = 96, 6  # of a block, and of a product in winograd.c

_NUMBERS = (
    *("N", "H", "W", "C", "K"),
    *("stride_out", "stride_in", "stride_row", "stride_col"),
    *("TH", "TW", "tiles", "scratch_size"),
)
_POINTERS = ("x", "w", "grad", "zeros", "y", "grad_w", "chosen", "u", "scratch", "sums")


class Job(ctypes.Structure):
    """The argument of winograd.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("flip", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("parts", "next", "joined", "summed")),
        ("phase", ctypes.c_void_p),
    )


Entry = Literal["convolve", "differentiate", "spread"]


@functools.cache
def compiled() -> dict[str, Callable[[Job, int], None]] | None:
    """winograd.c's entries, of an argument and a number of threads.

    None where they cannot be had, with a warning, once; and on a CPU without AVX2, where nobody has measured it.
    """
    if not is_measured():
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
    """Whether conv3x3 takes these: as is_taken has it, and of such sizes that it is faster."""
    return (
        is_taken(x, weight)
        and _used(x.shape[2]) * _used(x.shape[3]) >= LEAST_USED
        and all(channels % CHANNELS == 0 and channels >= FEWEST_CHANNELS for channels in weight.shape[:2])
        and (torch.backends.cpu.get_cpu_capability() == "AVX2" or not has_few_pixels(x, weight.shape[0]))
        and compiled() is not None
    )


def has_few_pixels(x: Tensor, outputs: int) -> bool:
    """Whether the weights' transforms take longer than all of a convolution by oneDNN, or its gradient of the weight."""
    num_images, channels, height, width = x.shape
    return channels * outputs > WEIGHTS_A_PIXEL * num_images * height * width


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


def conv3x3_pool(x_NCHW: Tensor, weight_KC33: Tensor) -> Tensor:
    """max_pool2d(conv3x3(x, weight), 2), (N, K, H // 2, W // 2) channels-last: its values, bit for bit, and its gradients.

    As conv3x3. The convolution itself is not kept, and a last row or column without a window is not computed; for backward one
    byte a value of the result is kept. H and W: 2 or more.
    """
    y: Tensor = _Conv3x3Pool.apply(x_NCHW, weight_KC33)
    return y


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution, without autograd."""
    return _convolve(x, weight, weight.stride(), weight.shape[0])[0]


def convolve_pool(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The maxima of its 2x2 windows, (N, K, H // 2, W // 2), and the pixel of each, 0 to 3, (N, H // 2, W // 2, K) uint8."""
    y, chosen = _convolve(x, weight, weight.stride(), weight.shape[0], pool=True)
    assert chosen is not None
    return y, chosen


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from that of y: the convolution with the flipped and transposed weight."""
    out, of_x, *sides = weight.stride()
    return _convolve(grad, weight, (of_x, out, *sides), weight.shape[1], flip=True)[0]


def grad_weight(x: Tensor, grad: Tensor, *, pool: bool = False) -> Tensor:
    """The gradient of the weight, (K, C, 3, 3), channels-last, from x and the gradient of y.

    pool: the gradient is spread()'s, so that a last row or column without a window holds zeros.
    """
    (num_images, channels, height, width), outputs = x.shape, grad.shape[1]
    threads, size = torch.get_num_threads(), 16 * MOST_TILES * (_padded(channels) + outputs)
    made = x.new_empty((outputs, 3, 3, channels))
    tensors = {
        "x": x, "grad": grad, "zeros": x.new_zeros(max(channels, outputs)), "grad_w": made,
        "scratch": x.new_empty(threads * size), "sums": x.new_empty(threads * 16 * outputs * _padded(channels)),
    }  # fmt: skip
    shape = {"N": num_images, "H": height, "W": width, "C": channels, "K": outputs, **_tiles(height, width, pool)}
    _call("differentiate", threads, tensors, **shape, tiles=MOST_TILES, scratch_size=size)
    return made.movedim(-1, 1)


def spread(grad: Tensor, chosen: Tensor, height: int, width: int) -> Tensor:
    """The gradient of the convolution, (N, K, height, width), from that of its maxima and their pixels."""
    num_images, outputs = grad.shape[:2]
    made = grad.new_empty((num_images, height, width, outputs))
    shape = {"N": num_images, "H": height, "W": width, "K": outputs, **_tiles(height, width, pool=True)}
    _call("spread", torch.get_num_threads(), {"grad": grad, "chosen": chosen, "y": made}, **shape)
    return made.movedim(-1, 1)


def _convolve(
    x: Tensor, weight: Tensor, strides: tuple[int, ...], outputs: int, *, flip: bool = False, pool: bool = False
) -> tuple[Tensor, Tensor | None]:
    (num_images, channels, height, width), threads = x.shape, torch.get_num_threads()
    tiles = min(MOST_TILES, max(ROWS, BLOCK_BYTES // (64 * channels) // ROWS * ROWS))
    size = 16 * tiles * (channels + PANEL) + PANEL
    y = x.new_empty((num_images, *((height // 2, width // 2) if pool else (height, width)), outputs))
    chosen = torch.empty_like(y, dtype=torch.uint8) if pool else None
    tensors = {
        "x": x, "w": weight, "zeros": x.new_zeros(channels), "y": y, "u": x.new_empty(16 * _padded(outputs) * channels),
        "scratch": x.new_empty(threads * size), **({"chosen": chosen} if chosen is not None else {}),
    }  # fmt: skip
    shape = {"N": num_images, "H": height, "W": width, "C": channels, "K": outputs, **_tiles(height, width, pool)}
    steps = dict(zip(("stride_out", "stride_in", "stride_row", "stride_col"), strides, strict=True))
    _call("convolve", threads, tensors, **shape, **steps, tiles=tiles, scratch_size=size, flip=flip)
    return y.movedim(-1, 1), chosen


def _tiles(height: int, width: int, pool: bool) -> dict[str, int]:
    """Rows and columns of tiles. A tile at the edge may hold one pixel in a direction; a window may not."""
    odd = 0 if pool else 1
    return {"TH": (height + odd) // 2, "TW": (width + odd) // 2}


def _padded(channels: int) -> int:
    return -(-channels // PANEL) * PANEL


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
        if needs_operators(grad):
            return gradients_by_operator(grad, x, weight, ctx.needs_input_grad)
        return _gradients(grad.contiguous(memory_format=torch.channels_last), x, weight, ctx.needs_input_grad)


class _Conv3x3Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y, chosen = convolve_pool(x, weight)
        ctx.save_for_backward(x, weight, chosen)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, chosen = ctx.saved_tensors
        sides = x.shape[2:]
        if needs_operators(grad):
            return gradients_by_operator(_spread_by_operators(grad, chosen, sides), x, weight, ctx.needs_input_grad)
        whole = spread(grad.contiguous(memory_format=torch.channels_last), chosen, *sides)
        return _gradients(whole, x, weight, ctx.needs_input_grad, pool=True)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], *, pool: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Those that are wanted of x and weight, in C where it is faster; `grad` is channels-last."""
    of_x, of_weight = wanted
    made = grad_input(grad, weight) if of_x else None
    if of_weight and has_few_pixels(x, weight.shape[0]):
        return made, gradients_by_operator(grad, x, weight, (False, True))[1]
    return made, grad_weight(x, grad, pool=pool) if of_weight else None


def _spread_by_operators(grad: Tensor, chosen: Tensor, sides: torch.Size) -> Tensor:
    """spread(), differentiable in grad."""
    places = F.one_hot(chosen.movedim(-1, 1).long(), 4).to(grad.dtype)  # (N, K, H // 2, W // 2, 4)
    height, width = (2 * (side // 2) for side in sides)
    windows = (grad[..., None] * places).unflatten(-1, (2, 2)).transpose(3, 4)
    full = windows.reshape(*grad.shape[:2], height, width)
    return F.pad(full, (0, sides[1] - width, 0, sides[0] - height))
