"""batch_norm_act of float32 on the CPU, channels-last, by norm.c: the passes of the Triton kernels, in torch's pool of threads.

Shape suffixes: C channels.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import native
from ._kernels import ACTS, Options, stride_of, writes_residual
from ._layout import as_pixels, empty_pixels, num_pixels

SOURCE = Path(__file__).with_name("norm.c")
FLAGS = ("-ffp-contract=off",)
VALUES_A_PART = 131_072  # of x: half a megabyte
ROWS_A_PART = 128  # at least: a part's sums are double, and four times as large as a row
STREAMED_FROM = 2_097_152  # values of x: 8 MB, beyond the caches of a core

_NUMBERS = ("R", "C", "x_stride", "residual_stride", "grad_stride", "second_stride")
_POINTERS = (
    *("x", "residual", "y", "grad", "second", "weight", "bias", "running_mean", "running_var", "mean", "rstd"),
    *("out", "grad_residual", "grad_weight", "grad_bias", "parts", "numbers"),
)


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
def compiled() -> tuple[Callable[[Batch, int], None], Callable[[Batch, int], None]] | None:
    """Forward and backward of norm.c, of a batch and a number of threads; None where they cannot be had, with a warning, once."""
    try:
        library = native.load(SOURCE, FLAGS)
    except native.NativeError as error:
        warnings.warn(f"batch norm on the CPU is slower than it might be: {error}", RuntimeWarning, stacklevel=2)
        return None
    pool = native.thread_pool()
    functions = library.fasttricks_norm_forward, library.fasttricks_norm_backward
    for function in functions:
        function.argtypes, function.restype = (ctypes.POINTER(Batch), ctypes.c_uint32, ctypes.c_void_p), None
    forward, backward = functions
    return lambda batch, threads: forward(batch, threads, pool), lambda batch, threads: backward(batch, threads, pool)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As _kernels.launch_forward, but the mean is float64."""
    residual = None if residual is None else as_pixels(residual)
    y, mean_C, rstd_C = empty_pixels(x), x.new_empty(x.shape[1], dtype=torch.float64), x.new_empty(x.shape[1])
    tensors = {
        "x": x, "residual": residual, "weight": weight, "bias": bias, "running_mean": running_mean,
        "running_var": running_var, "mean": mean_C, "rstd": rstd_C, "out": y,
    }  # fmt: skip
    strides = {"residual_stride": 0 if residual is None else stride_of(residual)}
    share = options.momentum if momentum is None else float(momentum)
    _call(0, x, tensors, strides, options._replace(momentum=share))
    return y, mean_C, rstd_C


def backward(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_C: Tensor,
    rstd_C: Tensor,
    options: Options,
    want_x: bool = True,
    want_numbers: bool = True,
    want_residual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As _kernels.launch_backward."""
    grad, second = as_pixels(grad), None if second is None else as_pixels(second)
    grad_x = empty_pixels(x) if want_x else None
    grad_residual = empty_pixels(x) if writes_residual(y, second, want_residual) else None
    grad_weight_C, grad_bias_C = (x.new_empty(x.shape[1]) for _ in range(2))
    tensors = {
        "x": x, "grad": grad, "second": second, "y": y, "weight": weight, "bias": bias, "mean": mean_C, "rstd": rstd_C,
        "out": grad_x, "grad_residual": grad_residual, "grad_weight": grad_weight_C, "grad_bias": grad_bias_C,
    }  # fmt: skip
    strides = {"grad_stride": stride_of(grad), "second_stride": 0 if second is None else stride_of(second)}
    _call(1, x, tensors, strides, options)
    return grad_x, grad_weight_C, grad_bias_C, grad_residual


def _call(which: int, x: Tensor, tensors: dict[str, Tensor | None], strides: dict[str, int], options: Options) -> None:
    functions = compiled()
    assert functions is not None
    num_rows, num_channels = num_pixels(x), x.shape[1]
    rows = max(ROWS_A_PART, VALUES_A_PART // num_channels)
    num_parts = -(-num_rows // rows)
    # named, to live as long as their addresses are in use
    parts = x.new_empty(2 * num_parts * num_channels, dtype=torch.float64)
    numbers = x.new_empty(5 * num_channels)
    addresses: dict[str, Any] = {name: value.data_ptr() for name, value in tensors.items() if value is not None}
    batch = Batch(
        R=num_rows,
        C=num_channels,
        x_stride=stride_of(x),
        **strides,
        **addresses,
        parts=parts.data_ptr(),
        numbers=numbers.data_ptr(),
        momentum=options.momentum,
        eps=options.eps,
        act=ACTS.index(options.act),
        training=options.training,
        stream=x.numel() >= STREAMED_FROM,
        rows=rows,
    )
    functions[which](batch, min(torch.get_num_threads(), num_parts))
