"""The losses on the CPU: reference.py's values, losses and gradient together, by half the exponentials that torch takes.

Only one multiplication remains for backward. float32 logits, and narrower ones widened to it, pass through losses.c where a C
compiler is available. float64 logits, and all logits without a compiler, pass through reference.py.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import _checks, native, reference
from .._launch import dense_rows
from ..reference import wide
from ._options import Ignored, Labels, Weights, named

SOURCE = Path(__file__).with_name("losses.c")
LOGITS_A_THREAD = 32_768  # as torch has it
PIXELS = 128  # of a block of planes.h
NO_TEACHER = Weights(temperature=1.0, hard_weight=1.0, soft_weight=0.0)


class Batch(ctypes.Structure):
    """The argument of losses.c, field by field."""

    _fields_ = (
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("target", ctypes.c_void_p),
        ("target_b", ctypes.c_void_p),
        ("target_bytes", ctypes.c_int32),
        ("target_b_bytes", ctypes.c_int32),
        ("lam", ctypes.c_void_p),
        ("lam_stride", ctypes.c_int64),
        ("ignore", ctypes.c_int64),
        ("has_ignore", ctypes.c_int32),
        ("uniform", ctypes.c_float),
        ("teacher", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        ("hard", ctypes.c_float),
        ("soft", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("chunk", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("ignored", ctypes.c_int64),
        ("ignored_b", ctypes.c_int64),
        ("weightless", ctypes.c_int64),
        ("status", ctypes.c_int32),
    )


Result = tuple[Tensor, Tensor, Ignored | None]


@functools.cache
def compiled() -> Callable[[Batch, int], int] | None:
    """The function of losses.c, of a batch and a number of threads; None where it cannot be had, with a warning, once."""
    try:
        library = native.load(SOURCE)
    except native.NativeError as error:
        warnings.warn(f"losses on the CPU are slower than they might be: {error}", RuntimeWarning, stacklevel=2)
        return None
    return native.entry(library, "fasttricks_losses", Batch, ctypes.c_int)


def losses_compiled() -> bool:
    """Whether the losses of float32 and 16-bit logits on this CPU are compiled C; else they are torch's, of other last bits.

    The first call compiles, a second, where the cache lacks it; a RuntimeWarning says, once, why there is none.
    """
    return compiled() is not None


def checked(labels: Labels, num_classes: int) -> Labels:
    """The labels, their values checked; without an ignore_index that none is. Reads values: inside an operator only."""
    used = None
    if labels.dense:
        return labels._replace(ignore_index=None)
    for name, labels_N in (("target", labels.target), ("target_b", labels.target_b)):
        if labels_N is None or not labels_N.numel():
            continue
        low, high = (int(value) for value in labels_N.aminmax())
        if low < 0 or high >= num_classes:
            _checks.check_label_values(name, labels_N, num_classes, labels.ignore_index)
        if labels.ignore_index is not None and low <= labels.ignore_index <= high:
            used = labels.ignore_index
    return labels._replace(ignore_index=used)


def cross_entropy(logits_NK: Tensor, labels: Labels, *, want_grad: bool = True) -> Result:
    """(N,) losses; (N, K) the gradient of their sum, in the losses' dtype, empty if not wanted; counts, where C has counted."""
    return _loss_and_grad(reference.cross_entropy, reference.cross_entropy_grad, (logits_NK,), labels, None, want_grad)


def distillation(
    logits_NK: Tensor, teacher_NK: Tensor, labels: Labels, weights: Weights, *, want_grad: bool = True
) -> Result:
    """As cross_entropy."""
    rows = logits_NK, teacher_NK
    return _loss_and_grad(reference.distillation, reference.distillation_grad, rows, labels, weights, want_grad)


def _loss_and_grad(
    loss: Callable[..., Tensor],
    grad: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    labels: Labels,
    weights: Weights | None,
    want_grad: bool,
) -> Result:
    """In C where that can be had, else by reference.py's `loss` and `grad`."""
    logits_NK = rows[0]
    function = compiled() if logits_NK.dtype != torch.float64 else None
    if function is not None:
        return _by_c(function, rows, labels, weights or NO_TEACHER, want_grad)
    _checks.check_lam_values(labels.lam_N)
    by_name = named(checked(labels, logits_NK.shape[1]), weights)
    loss_N = loss(*rows, **by_name)
    if not want_grad:
        return loss_N, loss_N.new_empty(0), None
    return loss_N, grad(torch.ones_like(loss_N), wide(logits_NK), *rows[1:], **by_name), None


def _by_c(
    function: Callable[[Batch, int], int], rows: tuple[Tensor, ...], labels: Labels, weights: Weights, want_grad: bool
) -> Result:
    # named, to live as long as their addresses are in use
    rows_NK = dense_rows(wide(rows[0])) if rows[0].dim() == 2 else wide(rows[0]).contiguous()
    teacher_NK = wide(rows[1]).contiguous() if len(rows) > 1 else None
    target_N = (wide(labels.target) if labels.dense else labels.target).contiguous()
    target_b_N = None if labels.target_b is None else labels.target_b.contiguous()
    lam_N = None if labels.lam_N is None else labels.lam_N.float().contiguous()
    weight_K = None if labels.weight_K is None else labels.weight_K.float().contiguous()
    lam = ctypes.c_float(labels.lam)
    num_rows, num_classes = rows_NK.shape[:2]
    pixels = rows_NK.shape[2] if rows_NK.dim() == 3 else 0
    if labels.lam_N is not None and (
        num_rows == 0 or labels.lam_N.dtype == torch.float64
    ):  # rounded, it may be in range
        _checks.check_lam_values(labels.lam_N)
    loss_N = rows_NK.new_empty(num_rows if not pixels else (num_rows, pixels))
    grad_NK = rows_NK.new_empty(rows_NK.shape if want_grad else 0)
    batch = Batch(
        N=num_rows,
        K=num_classes,
        pixels=pixels,
        logits=rows_NK.data_ptr(),
        stride=rows_NK.stride(0),
        target=target_N.data_ptr(),
        target_bytes=target_N.element_size(),
        lam=ctypes.addressof(lam) if lam_N is None else lam_N.data_ptr(),
        ignore=labels.ignore_index or 0,
        has_ignore=labels.ignore_index is not None,
        uniform=labels.uniform,
        loss=loss_N.data_ptr(),
        grad=grad_NK.data_ptr() if want_grad else None,
        chunk=max(1, LOGITS_A_THREAD // 4 // num_classes // (PIXELS if pixels else 1)),
    )
    if target_b_N is not None:
        batch.target_b, batch.target_b_bytes = target_b_N.data_ptr(), target_b_N.element_size()
        batch.lam_stride = 0 if lam_N is None else lam_N.dim()
    if labels.dense:
        batch.dense = target_N.data_ptr()
    if weight_K is not None:
        batch.weight = weight_K.data_ptr()
    if teacher_NK is not None:
        batch.teacher = teacher_NK.data_ptr()
        batch.temperature, batch.hard, batch.soft = weights
    status = function(batch, min(torch.get_num_threads(), rows_NK.numel() // LOGITS_A_THREAD))
    if status == 1:
        _checks.check_lam_values(labels.lam_N)
        checked(labels, num_classes)
        raise AssertionError("a label or lam is out of range by losses.c, but not by _checks")
    if status:
        raise MemoryError(f"no room for three rows of {num_classes} numbers a thread")
    return loss_N, grad_NK, Ignored(batch.ignored, batch.ignored_b, batch.weightless)


def scale_(
    grad_NK: Tensor, scale: Tensor | float, labels: Labels, ignored: Ignored | None = None, *, in_place: bool = True
) -> Tensor:
    """The gradient of a loss times a number, or one a row, in place if asked; 0, and not 0 * inf, in ignored rows."""
    if ignored is None or ignored.rows:
        zero_N = labels.ignored
        if zero_N is not None:
            scale = torch.where(zero_N, 0, torch.as_tensor(scale, dtype=grad_NK.dtype))
    if isinstance(scale, Tensor) and scale.dim():
        scale = scale[:, None]
    return grad_NK.mul_(scale) if in_place else grad_NK * scale
