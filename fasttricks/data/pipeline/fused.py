"""The compiled operator (augment.c) as a node of a DALI graph: resize, flip, colour and normalise in one pass.

DALI calls compiled callbacks through the operator behind its numba plugin: a C function for the shapes of a batch, and one
that its thread pool calls once a sample, without Python. So neither numba nor DALI's C++ headers (and CUDA's, which they
include) are needed, only a C compiler and half a second. The operator is internal to DALI: `find_callback` looks whether it
is there as it was, and where it is not, the graph does with DALI's own operators.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
from nvidia.dali import backend, ops, types

from fasttricks.config import Interpolation
from fasttricks_kernels import native
from fasttricks_kernels.native import NativeError

SOURCE = Path(__file__).with_name("augment.c")
FLAGS = ("-ffp-contract=off",)
"""Products are rounded before they are added, so that the vectors of a CPU change no bit."""
_OPERATOR = "NumbaFuncImpl"
_ARGUMENTS = {"run_fn", "setup_fn", "out_types", "in_types", "outs_ndim", "ins_ndim", "batch_processing"}


class Callback(NamedTuple):
    """Addresses of the compiled functions."""

    run: int
    shapes: int


def find_callback(interpolation: Interpolation, *, antialias: bool) -> Callback:
    """The compiled operator with this filter. Raises NativeError, which says why it cannot be had."""
    _check_operator()
    library = native.load(SOURCE, FLAGS)
    name = f"fasttricks_{interpolation}{'_antialias' if antialias else ''}"
    return Callback(_address(library, name), _address(library, "fasttricks_shapes"))


def _address(library: ctypes.CDLL, name: str) -> int:
    """Where the C function `name` lies in memory."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def resize_and_color(images: Any, matrix: Any, flip: Any, *, size: int, callback: Callback) -> Any:
    """(size, size, 3) float32 images: resized, rounded to 8 bits, mirrored where `flip`, times `matrix`.

    Args:
        images: (H, W, 3) uint8, any size.
        matrix: (3, 4) float32 an image, on pixels (r, g, b, 1) of 0 to 255.
        flip: () float32 an image, 0 or 1.
        size: 8 or more pixels.

    Deterministic: same bits whatever threads, batch and CPU. Cost: no memory but the output and a few rows a thread.
    """
    side = types.Constant(np.zeros(size, np.uint8), device="cpu")  # its length tells the callback the size
    return _operator()(device="cpu")(
        images,
        matrix,
        flip,
        side,
        run_fn=callback.run,
        setup_fn=callback.shapes,
        in_types=[types.UINT8, types.FLOAT, types.FLOAT, types.UINT8],
        ins_ndim=[3, 2, 0, 1],
        out_types=[types.FLOAT],
        outs_ndim=[3],
        batch_processing=False,
    )


@functools.cache
def _operator() -> Any:
    return ops.python_op_factory("FusedAugment", "NumbaFunction", _OPERATOR, generated=False)  # type: ignore[attr-defined]


def _check_operator() -> None:
    """Raise NativeError where this DALI has no operator for compiled callbacks, or one of other arguments."""
    try:
        known = set(backend.GetSchema(_OPERATOR).GetArgumentNames())  # type: ignore[attr-defined]
    except (KeyError, RuntimeError):
        known = set()
    if not known >= _ARGUMENTS:
        raise NativeError(f"DALI {nvidia.dali.__version__} takes no compiled callbacks as DALI 2.0 to 2.4 do")
