"""One SGD step of many parameters and the overflow check before it: each one launch, skipped on the device."""

# No `from __future__ import annotations`: torch.library reads the schema from annotations.
from typing import Any, Optional

import torch
from torch import Tensor

from .. import _checks, reference
from .._direct import lists_run_directly
from .._launch import NAMESPACE, runs_triton
from ._kernels import launch_overflow, launch_sgd
from ._memory import is_dense, lies_like, placed_like

# ------------------------------------------------------------------------------------------------------ custom ops
# No autograd: the step is under no_grad, and changes its arguments. An eager call goes past the dispatcher, which would
# convert hundreds of tensors from Python to C++ and back three times.


def _run_step(
    weights: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    momenta: list[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
    device_lr: Optional[Tensor] = None,
) -> None:
    run = launch_sgd if runs_triton(weights[0]) else reference.sgd_step
    options = lr, momentum, dampening, weight_decay, nesterov, maximize
    run(weights, grads, masters, momenta, *options, grad_scale, found_inf, device_lr)


_sgd_step = torch.library.custom_op(f"{NAMESPACE}::sgd_step", _run_step, mutates_args=("weights", "masters", "momenta"))


@_sgd_step.register_fake
def _(weights, grads, masters, momenta, *options) -> None:
    return None


def _run_overflow(grads: list[Tensor]) -> Tensor:
    return launch_overflow(grads) if runs_triton(grads[0]) else reference.overflow(grads)


_overflow = torch.library.custom_op(f"{NAMESPACE}::overflow", _run_overflow, mutates_args=())


@_overflow.register_fake
def _(grads) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=grads[0].device)


# ------------------------------------------------------------------------------------------------ public functions


@torch.no_grad()
def sgd_step(
    weights: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    momenta: list[Tensor],
    *,
    lr: "Tensor | float",
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Optional[Tensor] = None,
    found_inf: Optional[Tensor] = None,
) -> None:
    """One SGD step on FP32 masters, written to the model's weights too, for all parameters in one launch, in place.

        g = grad / grad_scale, negated with maximize, + weight_decay master;   v = momentum v + (1 - dampening) g
        master -= lr (g + momentum v)  with nesterov,  lr v  without;   weight = round(master)

    The options and their defaults are those of torch.optim.SGD. With momentum 0, master -= lr g.

    Args:
        weights: the model's parameters, of one dtype (float16, bfloat16, float32 or float64) and on one device; each
            dense in memory, in any dimension order. No two share memory: on a GPU all are updated at once.
        grads: like weights, in shape, dtype and device; copied first where their strides are others, or sparse.
        masters: float32, like weights, strides included; or [] for float32 and float64 weights, which are then their own.
        momenta: float32 (float64 for float64 weights), like weights, strides included; zeros before the first step.
            With momentum 0: [].
        lr: finite, at least 0: a number, or a tensor of one element on the CPU; or one on the weights' device, as grad_scale is.
            On a GPU the step reads it there, and its range is not checked: the host would wait for it.
        momentum, weight_decay: finite, at least 0.
        dampening: finite. torch.optim.SGD has none in a parameter's first step; here it is in each.
        nesterov: needs momentum above 0 and dampening 0.
        grad_scale: () float32 on the device: the loss scale that the gradients carry; they are divided by it.
        found_inf: () float32 on the device; where it is not 0, nothing at all is written (see `overflow`).

    Raises: TypeError, ValueError: lengths, dtypes, shapes, strides, devices or ranges that do not fit.

    Costs: one launch; 20 bytes a parameter for FP16 (the floor: 2 + 4 + 4 read, 2 + 4 + 4 written), without momentum 12;
    no sync. A table of addresses is copied to the device, asynchronously, when one of them changed. Deterministic.

    Source: He et al. 2018 (arXiv:1812.01187), section 3.2 (masters), 2.1 (Nesterov). Oracle: torch.optim.SGD.
    """
    numbers = checked_numbers(lr, momentum, dampening, weight_decay, nesterov)
    for name, tensors in (("weights", weights), ("grads", grads), ("masters", masters), ("momenta", momenta)):
        _checks.check_tensors(name, tensors)
    if not weights:
        return
    if momenta and not momentum:
        raise ValueError("momenta must be [] where momentum is 0: the step would neither read nor write them")
    grads = _checked_step(weights, grads, masters, momenta if momentum else None)
    device_lr = lr if isinstance(lr, Tensor) and _read_there(lr, weights[0]) else None
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf), ("lr", device_lr)):
        _check_scalar(name, scalar, weights[0])
    if device_lr is not None:
        numbers = 0.0, *numbers[1:]
    scalars = grad_scale, found_inf, device_lr
    direct = lists_run_directly(weights, grads, masters, momenta, [scalar for scalar in scalars if scalar is not None])
    run = _run_step if direct else _sgd_step
    run(weights, grads, masters, momenta, *numbers, nesterov, maximize, *scalars)
    if direct:  # as the operator does: autograd then refuses a backward pass that saved one of them
        torch.autograd.graph.increment_version([*weights, *masters, *momenta])


@torch.no_grad()
def overflow(grads: list[Tensor]) -> Tensor:
    """1 if any gradient is infinite or NaN, else 0: a () float32 tensor on their device, for `sgd_step(found_inf=)`.

    Args:
        grads: float16, bfloat16, float32 or float64, all of one dtype and on one device. Those that are not dense in memory
            are copied first.

    Raises: TypeError, ValueError: no gradient, or gradients of several dtypes or devices.

    Costs: one launch and a memset; 2 bytes a parameter in FP16; no sync. Deterministic. Oracle: torch.isfinite.
    """
    _checks.check_tensors("grads", grads)
    if not grads:
        raise ValueError("overflow() needs at least one gradient")
    dtype, device = grads[0].dtype, grads[0].device
    for position, grad in enumerate(grads):
        if grad.dtype is dtype and dtype in _checks.FLOATS and grad.device == device:
            continue
        if grad.dtype != grads[0].dtype or grad.dtype not in _checks.FLOATS:
            rule = "float16, bfloat16, float32 or float64, and all of them alike"
            raise TypeError(
                f"grads must be {rule}, but grads[{position}] is {grad.dtype} and grads[0] {grads[0].dtype}"
            )
        _checks.check_device(f"grads[{position}]", grad, "grads[0]", grads[0])
    grads = [grad if is_dense(grad) else grad.to_dense().contiguous() for grad in grads]
    return _run_overflow(grads) if lists_run_directly(grads) else _overflow(grads)


# ---------------------------------------------------------------------------------------------------------- checks


def checked_numbers(
    lr: Any, momentum: Any, dampening: Any, weight_decay: Any, nesterov: bool
) -> tuple[float, float, float, float]:
    """lr, momentum, dampening and weight_decay as numbers; 0 for an lr that is not on the CPU, for which the host would wait.

    Raises TypeError and ValueError, as torch.optim.SGD does.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, but has shape {tuple(lr.shape)}")
        lr = lr.item() if lr.is_cpu else 0.0
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        _checks.check_weight(name, value)
    _checks.check_number("dampening", dampening)
    _checks.check_weight("the magnitude of dampening", abs(dampening))
    if nesterov and (momentum == 0 or dampening != 0):
        rule = "nesterov=True needs momentum above 0 and dampening 0"
        raise ValueError(f"{rule}, but momentum is {momentum} and dampening {dampening}; pass nesterov=False")
    return float(lr), float(momentum), float(dampening), float(weight_decay)


def _read_there(lr: Tensor, weight: Tensor) -> bool:
    """Whether the step reads lr on the weights' device; else it is a number by then."""
    return not lr.is_cpu or (weight.is_cpu and lr.dtype == torch.float32)


def _check_scalar(name: str, scalar: Optional[Tensor], weight: Tensor) -> None:
    if scalar is None:
        return
    _checks.check_tensor(name, scalar)
    if scalar.dtype != torch.float32 or scalar.numel() != 1:
        raise TypeError(f"{name} must be () float32, but is {tuple(scalar.shape)} {scalar.dtype}")
    _checks.check_device(name, scalar, "weights[0]", weight)


def _checked_step(
    weights: list[Tensor], grads: list[Tensor], masters: list[Tensor], momenta: Optional[list[Tensor]]
) -> list[Tensor]:
    """The gradients, in the weights' memory order."""
    dtype, device = weights[0].dtype, weights[0].device
    wide = reference.wide_dtype(dtype)
    if dtype not in _checks.FLOATS:
        raise TypeError(f"weights must be float16, bfloat16, float32 or float64, not {dtype}")
    if not masters and dtype != wide:
        raise ValueError(f"{dtype} weights need float32 masters; only float32 and float64 weights may pass masters=[]")
    for position, weight in enumerate(weights):
        if not is_dense(weight):
            layout = f"shape {tuple(weight.shape)} and strides {weight.stride()}"
            raise ValueError(
                f"weights[{position}] must be dense in memory, but has {layout}; MasterSGD takes such weights"
            )
        if weight.dtype is not dtype or weight.device != device:
            _refuse("weights", weights, dtype, weights)
    layouts = [(weight.shape, weight.stride()) for weight in weights]
    if not _fit(grads, dtype, layouts, device):
        if len(grads) == len(weights):
            grads = [placed_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
        _refuse("grads", grads, dtype, weights)
    for name, tensors in (("masters", masters or None), ("momenta", momenta)):
        if tensors is not None and not _fit(tensors, wide, layouts, device):
            _refuse(name, tensors, wide, weights)
    return grads


def _fit(tensors: list[Tensor], dtype: torch.dtype, layouts: list[tuple[Any, ...]], device: torch.device) -> bool:
    """Whether these are like the weights, at one look at each: hundreds of times a step, all is well."""
    return len(tensors) == len(layouts) and all(
        tensor.dtype is dtype
        and tensor.layout is torch.strided
        and (tensor.shape, tensor.stride()) == layout
        and tensor.device == device
        for tensor, layout in zip(tensors, layouts, strict=True)
    )


def _refuse(name: str, tensors: list[Tensor], dtype: torch.dtype, weights: list[Tensor]) -> None:
    """Raise the error that names the first that does not fit; none where only the stride of a single element is another."""
    if len(tensors) != len(weights):
        raise ValueError(f"{name} must be {len(weights)} tensors, one a weight, but are {len(tensors)}")
    for position, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}[{position}] must be {dtype}, not {tensor.dtype}")
        if not lies_like(tensor, weight):
            raise ValueError(
                f"{name}[{position}] must have the weight's shape {tuple(weight.shape)} and strides "
                f"{weight.stride()}, but has {tuple(tensor.shape)} and {tensor.stride()}; "
                f"torch.empty_like(weight).copy_(tensor) gives it them"
            )
        _checks.check_device(f"{name}[{position}]", tensor, "weights[0]", weights[0])
