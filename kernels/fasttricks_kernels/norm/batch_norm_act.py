"""Batch norm, the addition of a residual and the activation: one read for the statistics, one read and one write for the rest.

Shape suffixes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch.distributed as dist
from torch import Tensor

from .. import _checks, reference
from .._direct import runs_directly
from .._transforms import transformed
from ._launches import ACTS
from ._operators import fused, fuses
from ._synchronized import synchronized

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
    process_group: dist.ProcessGroup | None = ...,
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
    process_group: dist.ProcessGroup | None = ...,
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
    process_group: dist.ProcessGroup | None = None,
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
        process_group: in `training`, statistics over the values of all its ranks, each of which must make this call, and its
            backward. None: over this rank's own. A rank may have an empty x. The gradients of weight and bias are of this
            rank's values alone, as torch.nn.SyncBatchNorm has them. A group of one rank is as None.

    Returns:
        y, of x's shape and dtype; channels-last where x is, and dense. Differentiable in x, weight, bias and residual,
        twice. The gradient passes where y as stored, after rounding, is above 0, and for relu6 below 6. An empty batch has
        gradients of 0, and leaves the running statistics. With `fork` two tensors on the same memory. Change neither in
        place, since the other changes too: where autograd records, it refuses. torch.compile and export have a copy instead.

    Raises:
        RuntimeError, ValueError: with torch's text: a length other than C, running statistics that are missing, one value a
            channel in training, an eps that is negative. And TypeError, ValueError: a wrong dtype, device, shape or name.
        NotImplementedError: with a `process_group` of several ranks, torch.compile, torch.func or a second derivative.

    Costs: no sync, no atomics; deterministic. On CUDA, for x that is channels-last and not float64: each pass reads or
    writes a tensor of x's size. Forward takes 3 passes, 4 with a residual. Backward takes 5, and 6 with a residual and an
    activation. With both gradients of a fork it takes 7, for each of two passes reads both. With a residual it takes 7 too:
    the first pass writes the masked sum, which is the residual's gradient, and the second reads it.
    Backward keeps x. With a residual and an activation it keeps y's mask too, a bit a value: a byte for 16 bytes of y (8 values
    of 16 bits, 4 of 32), which forward writes and backward reads, 1/16 of a pass each. Where a pixel's C values are no multiple
    of 16 bytes, backward keeps y for the mask, and reads it: one pass more. On the CPU C does so for float32, keeps y too, and
    has bits that do not depend on the number of threads. Everything else is torch's batch norm in float32 and the rest in plain
    PyTorch: other layouts and dtypes, the second derivative, torch.func, torch.compile on the CPU, and a CPU without a C
    compiler.

    With a process_group forward has one all_gather of 3 C + 1 numbers, and backward one of 2 C. They are added in rank order,
    so all ranks have the same bits. There x of another layout is copied.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2; the statistics are merged as by Chan, Golub and
    LeVeque 1983. Oracle: torch.nn.functional.batch_norm in float64.
    """
    _checks.check_flag("training", training)
    _checks.check_flag("fork", fork)
    ranks = 1 if process_group is None else _num_ranks(process_group, training)
    _check(x, weight, bias, running_mean, running_var, residual, act, training, momentum, eps, ranks)
    tensors = x, weight, bias, running_mean, running_var, residual
    if process_group is not None and ranks > 1:
        if transformed(*tensors) or not runs_directly(*tensors):
            raise NotImplementedError(
                "batch_norm_act with a process_group runs eagerly, not under torch.compile, export, torch.func or a mode; "
                "there use torch.nn.SyncBatchNorm"
            )
        return synchronized(*tensors, momentum, process_group, act=act, eps=eps, fork=fork)
    options: dict[str, Any] = {"act": act, "training": training, "eps": eps, "fork": fork}
    if fuses(x) and not transformed(*tensors):
        return fused(*tensors, momentum, **options)
    return reference.batch_norm_act(*tensors, momentum=momentum, **options)


def _num_ranks(process_group: dist.ProcessGroup, training: bool) -> int:
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, as torch.distributed.group.WORLD is, or None, not "
            f"{type(process_group).__name__}"
        )
    if not training:
        raise ValueError("process_group must be None where not training: evaluation has no statistics to gather")
    ranks = dist.get_world_size(process_group)
    if ranks < 1:
        raise ValueError("process_group must have this rank among its own")
    return ranks


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
    ranks: int,
) -> None:
    _checks.check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, ...), but has shape {tuple(x.shape)}")
    if x.dtype not in _checks.FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, not {x.dtype}")
    _checks.check_choice("act", act, ACTS)
    num_channels, dtype = x.shape[1], reference.wide_dtype(x.dtype)
    if training and math.prod(x.shape[2:], start=x.shape[0]) == 1 and ranks == 1:
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
