"""Nesterov SGD with FP32 masters for FP16 models: all parameters in one launch, unscaled and skipped on the device."""

# No `from __future__ import annotations`: torch.library reads the schema from annotations.
from collections.abc import Callable, Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from .. import _checks, reference
from .._launch import NAMESPACE, runs_triton
from ._kernels import launch_overflow, launch_sgd

# ------------------------------------------------------------------------------------------------------ custom ops
# No autograd: the step is under no_grad, and changes its arguments.


@torch.library.custom_op(f"{NAMESPACE}::sgd_step", mutates_args=("weights", "masters", "momenta"))
def _sgd_step(
    weights: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    momenta: list[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
) -> None:
    run = launch_sgd if runs_triton(weights[0]) else reference.sgd_step
    run(weights, grads, masters, momenta, lr, momentum, weight_decay, nesterov, grad_scale, found_inf)


@_sgd_step.register_fake
def _(weights, grads, masters, momenta, *options) -> None:
    return None


@torch.library.custom_op(f"{NAMESPACE}::overflow", mutates_args=())
def _overflow(grads: list[Tensor]) -> Tensor:
    return launch_overflow(grads) if runs_triton(grads[0]) else reference.overflow(grads)


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
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = True,
    grad_scale: Optional[Tensor] = None,
    found_inf: Optional[Tensor] = None,
) -> None:
    """One SGD step on FP32 masters, written to the model's weights too, for all parameters in one launch, in place.

        g = grad / grad_scale + weight_decay master;   v = momentum v + g
        master -= lr (g + momentum v)  with nesterov,  lr v  without;   weight = round(master)

    Args:
        weights: the model's parameters, of one dtype (float16, bfloat16 or float32) and on one device; each dense in
            memory, in any dimension order.
        grads: like weights, element for element, strides included.
        masters: float32, like weights; or [] for float32 weights, which are then their own masters.
        momenta: float32, like weights; zeros before the first step.
        lr, momentum, weight_decay: finite, at least 0.
        grad_scale: () float32 on the device: the loss scale that the gradients carry; they are divided by it.
        found_inf: () float32 on the device; where it is not 0, nothing at all is written (see `overflow`).

    Raises: TypeError, ValueError: lengths, dtypes, shapes, strides, devices or ranges that do not fit.

    Costs: one launch; 20 bytes a parameter for FP16 (the floor: 2 + 4 + 4 read, 2 + 4 + 4 written); no sync. A table
    of addresses is copied to the device, asynchronously, when one of them changed. Deterministic.

    Source: He et al. 2018 (arXiv:1812.01187), section 3.2 (masters), 2.1 (Nesterov). Oracle: torch.optim.SGD.
    """
    _check_step(weights, grads, masters, momenta)
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        _checks.check_weight(name, value)
    if weights:
        _sgd_step(
            weights,
            grads,
            masters,
            momenta,
            float(lr),
            float(momentum),
            float(weight_decay),
            nesterov,
            grad_scale,
            found_inf,
        )


@torch.no_grad()
def overflow(grads: list[Tensor]) -> Tensor:
    """1 if any gradient is infinite or NaN, else 0: a () float32 tensor on their device, for `sgd_step(found_inf=)`.

    Costs: one launch and a memset; 2 bytes a parameter in FP16; no sync. Deterministic. Oracle: torch.isfinite.
    """
    if not grads:
        raise ValueError("overflow() needs at least one gradient")
    return _overflow(grads)


def _check_step(weights: list[Tensor], grads: list[Tensor], masters: list[Tensor], momenta: list[Tensor]) -> None:
    if not weights:
        return
    dtype = weights[0].dtype
    if dtype not in _checks.FLOATS:
        raise TypeError(f"weights must be float16, bfloat16 or float32, not {dtype}")
    if not masters and dtype != reference.wide_dtype(dtype):
        raise ValueError(f"{dtype} weights need float32 masters; only float32 weights may pass masters=[]")
    for name, tensors, wanted in (
        ("weights", weights, dtype),
        ("grads", grads, dtype),
        ("masters", masters or weights, reference.wide_dtype(dtype)),
        ("momenta", momenta, reference.wide_dtype(dtype)),
    ):
        if len(tensors) != len(weights):
            raise ValueError(f"{name} must be {len(weights)} tensors, one a weight, but are {len(tensors)}")
        for position, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            if tensor.dtype != wanted:
                raise TypeError(f"{name}[{position}] must be {wanted}, not {tensor.dtype}")
            if tensor.shape != weight.shape or tensor.stride() != weight.stride():
                raise ValueError(
                    f"{name}[{position}] must have the weight's shape {tuple(weight.shape)} and strides "
                    f"{weight.stride()}, but has {tuple(tensor.shape)} and {tensor.stride()}; "
                    f"torch.empty_like(weight).copy_(tensor) gives it them"
                )
            _checks.check_device(f"{name}[{position}]", tensor, "weights[0]", weights[0])


class MasterSGD(torch.optim.Optimizer):
    """SGD with momentum for models in FP16 or BF16: FP32 masters in its state, one launch a group, skips on overflow.

    The same update as torch.optim.SGD (dampening 0) on the masters; float32 parameters are their own masters. Where
    a loss scale is given, gradients are divided by it, and the whole step is skipped, on the device, if one of them
    is not finite; `overflow` then holds 1 (a () float32 tensor, to adapt the scale by without a sync).

    Works with torch.amp.GradScaler too: scaler.step(optimizer) hands over its scale and its overflow check.

    Args:
        params: parameters or groups, as for any torch.optim.Optimizer. Masters are made at the first step.
        lr: learning rate, a step; momentum, weight_decay: finite, at least 0.
        nesterov: g + momentum v instead of v.
    """

    _step_supports_amp_scaling = True  # GradScaler: "I unscale and skip myself"

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = True
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            _checks.check_weight(name, value)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults)
        self.overflow: Optional[Tensor] = None

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None, *, loss_scale: Optional[Tensor] = None) -> Any:
        """Update every parameter that has a gradient. loss_scale: () float32 tensor on the parameters' device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale = loss_scale if loss_scale is not None else getattr(self, "grad_scale", None)
        self.overflow = getattr(self, "found_inf", None) if loss_scale is None else self._find_overflow()
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
            for params in _by_dtype(p for p in group["params"] if p.grad is not None):
                wide = params[0].dtype == reference.wide_dtype(params[0].dtype)
                states = [self._state_of(p) for p in params]
                sgd_step(
                    params,
                    [_grad_like(p) for p in params],
                    [] if wide else [s["master"] for s in states],
                    [s["momentum_buffer"] for s in states],
                    grad_scale=grad_scale,
                    found_inf=self.overflow,
                    **options,
                )
        return loss

    def master_of(self, param: Tensor) -> Tensor:
        """The FP32 tensor that step() updates `param` from: its master, made now if need be, or `param` if it is FP32."""
        return self._state_of(param).get("master", param)

    def _find_overflow(self) -> Optional[Tensor]:
        """One check over the gradients of every group: a step is skipped as a whole or not at all."""
        found = None
        for params in _by_dtype(p for group in self.param_groups for p in group["params"] if p.grad is not None):
            here = overflow([_grad_like(p) for p in params])
            found = here if found is None else torch.maximum(found, here)
        return found

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            wide = reference.wide_dtype(param.dtype)
            if param.dtype != wide:
                state["master"] = param.detach().to(wide, memory_format=torch.preserve_format)
            state["momentum_buffer"] = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but FP32 stays FP32: torch's own casts state to the parameter's FP16."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                exact = torch.empty_like(param, dtype=value.dtype, memory_format=torch.preserve_format)
                self.state[param][name] = exact.copy_(value)


def _by_dtype(params: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in params:
        groups.setdefault((param.dtype, param.device), []).append(param)
    return list(groups.values())


def _grad_like(param: Tensor) -> Tensor:
    """The gradient in the parameter's own memory order; copied only if autograd chose another."""
    grad = param.grad
    assert grad is not None
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param, memory_format=torch.preserve_format).copy_(grad)
