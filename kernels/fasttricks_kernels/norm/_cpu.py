"""batch_norm_act of float32 on the CPU, channels-last, by norm.c: the passes of the Triton kernels, in torch's pool of threads.

Shape suffixes: C channels.
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
from ._launches import ACTS, Options, writes_residual
from ._layout import as_pixels, empty_pixels, num_pixels, stride_of

SOURCE = Path(__file__).with_name("norm.c")
FLAGS = ("-ffp-contract=off",)
VALUES_A_PART = 131_072  # of x: half a megabyte
ROWS_A_PART = 128  # at least: a part's sums are double, and four times as large as a row
STREAMED_FROM = 2_097_152  # values of x: 8 MB, beyond the caches of a core

_NUMBERS = ("R", "C", "x_stride", "residual_stride", "grad_stride", "second_stride")
_POINTERS = (
    *("x", "residual", "y", "grad", "second", "weight", "bias", "running_mean", "running_var", "numbers", "out"),
    *("grad_residual", "grad_weight", "grad_bias", "parts", "totals", "means"),
)
Entry = Literal["statistics", "normalise", "forward", "sums", "gradient", "backward"]


class Batch(ctypes.Structure):
    """The argument of norm.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("momentum", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("act", ctypes.c_int32),
        ("training", ctypes.c_int32),
        ("stream", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("phase", ctypes.c_void_p),
    )


@functools.cache
def compiled() -> dict[str, Callable[[Batch, int], None]] | None:
    """norm.c's entries, of a batch and a number of threads; None where they cannot be had, with a warning, once."""
    try:
        library = native.load(SOURCE, FLAGS)
    except native.NativeError as error:
        warnings.warn(f"batch norm on the CPU is slower than it might be: {error}", RuntimeWarning, stacklevel=2)
        return None
    return {name: native.entry(library, f"fasttricks_norm_{name}", Batch) for name in get_args(Entry)}


def batch_norm_compiled() -> bool:
    """Whether batch_norm_act of float32 on this CPU is compiled C; else it is torch's, of other last bits.

    The first call compiles, a second, where the cache lacks it; a RuntimeWarning says, once, why there is none.
    """
    return compiled() is not None


def takes(x: Tensor) -> bool:
    """Whether norm.c may take it; torch.compile is left torch's operators, which inductor fuses."""
    return x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling() and compiled() is not None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    momentum: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """As _launches.launch_forward."""
    residual = None if residual is None else as_pixels(residual)
    y, numbers_4C = empty_pixels(x), x.new_empty((4, x.shape[1]))
    tensors = {
        "residual": residual, "weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var,
        "numbers": numbers_4C, "out": y,
    }  # fmt: skip
    share = options.momentum if momentum is None else float(momentum)
    call("forward", x, tensors, options._replace(momentum=share))
    return y, numbers_4C


def backward(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    numbers_4C: Tensor,
    options: Options,
    want_x: bool = True,
    want_numbers: bool = True,
    want_residual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As _launches.launch_backward."""
    grad, second = as_pixels(grad), None if second is None else as_pixels(second)
    grad_x = empty_pixels(x) if want_x else None
    grad_residual = empty_pixels(x) if writes_residual(y, second, want_residual) else None
    grad_weight_C, grad_bias_C = (x.new_empty(x.shape[1]) for _ in range(2))
    tensors = {
        "grad": grad, "second": second, "y": y, "numbers": numbers_4C, "out": grad_x, "grad_residual": grad_residual,
        "grad_weight": grad_weight_C, "grad_bias": grad_bias_C, "means": x.new_empty((2, x.shape[1])),
    }  # fmt: skip
    call("backward", x, tensors, options)
    return grad_x, grad_weight_C, grad_bias_C, grad_residual


def call(entry: Entry, x: Tensor, tensors: dict[str, Tensor | None], options: Options) -> Tensor:
    """An entry of norm.c on x and these fields of its Batch. Returns the totals (2, C) float64, which not every entry writes."""
    functions = compiled()
    assert functions is not None
    num_rows, num_channels = num_pixels(x), x.shape[1]
    rows = max(ROWS_A_PART, VALUES_A_PART // num_channels)
    num_parts = -(-num_rows // rows)
    # named, to live as long as their addresses are in use
    parts, totals_2C = (x.new_empty((2, n), dtype=torch.float64) for n in (num_parts * num_channels, num_channels))
    tensors = {"x": x, **tensors, "parts": parts, "totals": totals_2C}
    addresses: dict[str, Any] = {name: value.data_ptr() for name, value in tensors.items() if value is not None}
    strided = {name: tensors.get(name) for name in ("x", "residual", "grad", "second")}
    batch = Batch(
        R=num_rows,
        C=num_channels,
        **{f"{name}_stride": stride_of(value) for name, value in strided.items() if value is not None},
        **addresses,
        momentum=options.momentum,
        eps=options.eps,
        act=ACTS.index(options.act),
        training=options.training,
        stream=x.numel() >= STREAMED_FROM,
        rows=rows,
    )
    functions[entry](batch, min(torch.get_num_threads(), num_parts))
    return totals_2C
