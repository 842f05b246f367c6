"""Batch norm, the addition of a residual and the activation: one read for the statistics, one read and one write for the rest.

Shape suffixes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

from torch import Tensor

from .. import _checks, reference
from .._transforms import transformed
from ._launches import ACTS
from ._operators import fused, fuses

Act = Literal["none", "relu", "relu6"]


@overload
def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = ...,
    act: Act = ...,
    training: bool,
    momentum: Tensor | float,
    eps: float,
    fork: Literal[False] = ...,
) -> Tensor: ...


@overload
def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = ...,
    act: Act = ...,
    training: bool,
    momentum: Tensor | float,
    eps: float,
    fork: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    act: Act = "none",
    training: bool,
    momentum: Tensor | float,
    eps: float,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(torch.nn.functional.batch_norm(x) + residual), rounded once.

        y = act(weight (x - mean) / sqrt(var + eps) + bias + residual)

    mean and var are each channel's over all its values in `training`, var without Bessel's correction; otherwise the
    running ones. In `training` the running ones, where given, become (1 - momentum) old + momentum new; that var is with
    Bessel's correction.

    Args:
        x: (N, C, ...) float16, bfloat16, float32 or float64; not modified. A slice of the channels of a wider channels-last
            tensor is read where it lies.
        weight, bias: (C,) float32, or float64 for float64 x; or None for 1 and 0.
        running_mean, running_var: as weight; both or neither. They are required where not `training`.
        residual: a tensor of x's shape and dtype, or None.
        act: "none", "relu" or "relu6", which is min(max(y, 0), 6).
        training: the batch's statistics. A module without running statistics (track_running_stats=False) passes True always.
        momentum: a finite number, or a () floating point tensor on x's device. For a module's momentum=None, the average of
            all batches, pass 1 / num_batches_tracked.
        eps: a finite number of at least 0, positive in `training`.
        fork: return y twice, for its two uses. Backward then adds the two gradients, in float32; with a residual the sum is
            rounded to its dtype before all else. Without `fork` autograd adds them, by an operator and 3 passes of its own.

    Returns:
        y, of x's shape and dtype; channels-last where x is, and dense. Differentiable in x, weight, bias and residual,
        twice. The gradient passes where y as stored, after rounding, is above 0, and for relu6 below 6. An empty batch has
        gradients of 0, and leaves the running statistics. With `fork` two tensors on the same memory. Change neither in
        place, since the other changes too: where autograd records, it refuses. torch.compile and export have a copy instead.

    Raises:
        RuntimeError, ValueError: with torch's text: a length other than C, running statistics that are missing, one value a
            channel in training, an eps that is negative. And TypeError, ValueError: a wrong dtype, device, shape or name.

    Costs: no sync, no atomics; deterministic. On CUDA, for x that is channels-last and not float64: each pass reads or
    writes a tensor of x's size. Forward takes 3 passes, 4 with a residual. Backward takes 5, and 7 with a residual and an
    activation. Backward keeps x, and y too with a residual and an activation. On the CPU the same for float32, by C, whose
    bits do not depend on the number of threads. Everything else is torch's batch norm in float32 and the rest in plain
    PyTorch: other layouts and dtypes, the second derivative, torch.func, torch.compile on the CPU, and a CPU without a C
    compiler.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2; the statistics are merged as by Chan, Golub and
    LeVeque 1983. Oracle: torch.nn.functional.batch_norm in float64.
    """
    _check(x, weight, bias, running_mean, running_var, residual, act, training, momentum, eps)
    options: dict[str, Any] = {"act": act, "training": training, "eps": eps, "fork": fork}
    tensors = x, weight, bias, running_mean, running_var, residual
    if fuses(x) and not transformed(*tensors):
        return fused(*tensors, momentum, **options)
    return reference.batch_norm_act(*tensors, momentum=momentum, **options)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    act: str,
    training: bool,
    momentum: Tensor | float,
    eps: float,
) -> None:
    _checks.check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, ...), but has shape {tuple(x.shape)}")
    if x.dtype not in _checks.FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, not {x.dtype}")
    _checks.check_choice("act", act, ACTS)
    num_channels, dtype = x.shape[1], reference.wide_dtype(x.dtype)
    if training and math.prod(x.shape[2:], start=x.shape[0]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None and not training:
        raise RuntimeError("running_mean must be defined in evaluation mode")
    numbers = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, number in numbers.items():
        if number is None:
            continue
        _checks.check_tensor(name, number)
        if number.numel() != num_channels:
            raise RuntimeError(f"{name} should contain {num_channels} elements not {number.numel()}")
        if number.dim() != 1 or not number.is_contiguous():
            raise ValueError(
                f"{name} must be ({num_channels},) and contiguous, but has shape {tuple(number.shape)} "
                f"and strides {number.stride()}; {name}.reshape(-1).contiguous() is"
            )
        if number.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} for x of {x.dtype}, not {number.dtype}; {name}.to({dtype}) is")
        _checks.check_device(name, number, "x", x)
    if residual is not None:
        _checks.check_same("residual", residual, "x", x)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual must be {x.dtype} as x, not {residual.dtype}; residual.to({x.dtype}) is")
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or not momentum.is_floating_point():
            raise TypeError(
                f"momentum must be a number or a () floating point tensor, but is {momentum.dtype} of shape "
                f"{tuple(momentum.shape)}"
            )
        _checks.check_device("momentum", momentum, "x", x)
    elif momentum is None:
        raise TypeError(
            "momentum must be a number or a () tensor, not None; the average of all batches is 1 / num_batches_tracked"
        )
    else:
        _checks.check_number("momentum", momentum)
        if not -float("inf") < momentum < float("inf"):
            raise ValueError(f"momentum must be a finite number, but is {momentum}")
    _checks.check_number("eps", eps)
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0.0 or eps == float("inf"):
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
