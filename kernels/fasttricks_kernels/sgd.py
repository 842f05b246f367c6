"""Nesterov SGD with FP32 masters for FP16 models: all parameters in one launch, unscaled and skipped on the device.

Over 300 lines because a family stays in one file: the step, the overflow check and the optimizer that calls them.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr, and torch.library the schema, from annotations.
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _checks, reference
from ._launch import NAMESPACE, PINNED, on_device_of, runs_triton

BLOCK = 1024  # elements a program updates: with 2048 a thread holds twice as many registers
OVERFLOW_BLOCK = 4096  # elements a program checks
FIELDS = 5  # of a tensor in the table: the addresses of weight, gradient, master and momentum; the element count

TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# ---------------------------------------------------------------------------------------------------- device code


@triton.jit
def tensor_at(table_ptr, tensor, FIELD: tl.constexpr, FIELDS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in the table as a pointer; ALIGNED promises 16 bytes, without which every access is narrow."""
    pointer = tl.load(table_ptr + tensor * FIELDS + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def block_of(table_ptr, blocks_ptr, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tensor, its lanes there, and how many elements the tensor has."""
    tensor = tl.load(blocks_ptr + 2 * tl.program_id(0))
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    return tensor, start, tl.load(table_ptr + tensor * FIELDS + 4)


@triton.jit
def update_block(
    weight_ptr,
    grad_ptr,
    master_ptr,
    momentum_ptr,
    grad_scale_ptr,
    lane_B,
    live_B,
    lr,
    momentum,
    weight_decay,
    NESTEROV: tl.constexpr,
    HAS_MASTER: tl.constexpr,
):
    """g = grad / scale + weight_decay w; v = momentum v + g; w -= lr (g + momentum v, or v)."""
    grad_B = tl.load(grad_ptr + lane_B, mask=live_B).to(tl.float32)
    if grad_scale_ptr is not None:
        grad_B = grad_B / tl.load(grad_scale_ptr)
    master_B = tl.load(master_ptr + lane_B, mask=live_B)
    grad_B += weight_decay * master_B
    momentum_B = momentum * tl.load(momentum_ptr + lane_B, mask=live_B) + grad_B
    master_B -= lr * (grad_B + momentum * momentum_B if NESTEROV else momentum_B)
    tl.store(momentum_ptr + lane_B, momentum_B, mask=live_B)
    tl.store(master_ptr + lane_B, master_B, mask=live_B)
    if HAS_MASTER:
        tl.store(weight_ptr + lane_B, master_B.to(weight_ptr.dtype.element_ty), mask=live_B)


@triton.jit
def sgd_kernel(
    table_ptr,
    blocks_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    lr,
    momentum,
    weight_decay,
    NESTEROV: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block of one tensor; nothing at all where found_inf is set."""
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    if not skip:
        tensor, start, count = block_of(table_ptr, blocks_ptr, FIELDS, BLOCK)
        weight_ptr = tensor_at(table_ptr, tensor, 0, FIELDS, WEIGHT, ALIGNED)
        grad_ptr = tensor_at(table_ptr, tensor, 1, FIELDS, WEIGHT, ALIGNED)
        master_ptr = tensor_at(table_ptr, tensor, 2, FIELDS, tl.float32, ALIGNED)
        momentum_ptr = tensor_at(table_ptr, tensor, 3, FIELDS, tl.float32, ALIGNED)
        lane_B = start + tl.arange(0, BLOCK)
        if start + BLOCK <= count:  # unmasked: a mask against a run-time count would narrow every access
            update_block(
                weight_ptr,
                grad_ptr,
                master_ptr,
                momentum_ptr,
                grad_scale_ptr,
                lane_B,
                None,
                lr,
                momentum,
                weight_decay,
                NESTEROV,
                HAS_MASTER,
            )
        else:
            update_block(
                weight_ptr,
                grad_ptr,
                master_ptr,
                momentum_ptr,
                grad_scale_ptr,
                lane_B,
                lane_B < count,
                lr,
                momentum,
                weight_decay,
                NESTEROV,
                HAS_MASTER,
            )


@triton.jit
def overflow_kernel(
    table_ptr,
    blocks_ptr,
    found_ptr,
    WEIGHT: tl.constexpr,
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """found = 1 if this block holds a gradient that is not finite. All who write, write 1: no atomic, one outcome."""
    tensor, start, count = block_of(table_ptr, blocks_ptr, FIELDS, BLOCK)
    grad_ptr = tensor_at(table_ptr, tensor, 1, FIELDS, WEIGHT, ALIGNED)
    lane_B = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        grad_B = tl.load(grad_ptr + lane_B)
    else:
        grad_B = tl.load(grad_ptr + lane_B, mask=lane_B < count, other=0.0)
    finite_B = tl.abs(grad_B.to(tl.float32)) < float("inf")  # false for NaN too
    tl.store(found_ptr, 1.0, mask=tl.min(finite_B.to(tl.int32), 0) == 0)


# --------------------------------------------------------------------------------------------------------- launch


@lru_cache(maxsize=64)
def _table(addresses: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensors, FIELDS) int64 and (programs, 2) int32 (tensor, block) on the device: made anew when an address changes.

    Copied from pinned memory, so the host does not wait.
    """
    blocks = [(t, b) for t, (*_, count) in enumerate(addresses) for b in range(triton.cdiv(count, block))]
    pin = device.type == "cuda"
    table = torch.tensor(addresses, dtype=torch.int64, pin_memory=pin)
    return table.to(device, non_blocking=True), torch.tensor(blocks, dtype=torch.int32, pin_memory=pin).to(
        device, non_blocking=True
    )


def _launch(kernel: Any, tensors: Sequence[tuple[Tensor, ...]], block: int, *arguments: Any, **options: Any) -> None:
    """Launch over (weight, gradient, master, momentum) of every parameter; all weights have one dtype."""
    weights = tensors[0][0]
    addresses = tuple((*(t.data_ptr() for t in group), group[0].numel()) for group in tensors if group[0].numel())
    if not addresses:
        return
    table, blocks = _table(addresses, block, weights.device)
    aligned = all(address % 16 == 0 for group in addresses for address in group[:-1])
    with on_device_of(weights):
        kernel[(len(blocks),)](
            table,
            blocks,
            *arguments,
            WEIGHT=TRITON_TYPES[weights.dtype],
            FIELDS=FIELDS,
            ALIGNED=aligned,
            BLOCK=block,
            num_warps=4,
            **PINNED,
            **options,
        )


def launch_sgd(
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
    has_master = len(masters) > 0
    tensors = list(zip(weights, grads, masters if has_master else weights, momenta, strict=True))
    _launch(
        sgd_kernel,
        tensors,
        BLOCK,
        grad_scale,
        found_inf,
        lr,
        momentum,
        weight_decay,
        NESTEROV=nesterov,
        HAS_MASTER=has_master,
    )


def launch_overflow(grads: list[Tensor]) -> Tensor:
    found = torch.zeros((), dtype=torch.float32, device=grads[0].device)
    _launch(overflow_kernel, [(g, g, g, g) for g in grads], OVERFLOW_BLOCK, found)
    return found


# ----------------------------------------------------------------------------------------------------- custom ops
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
        grad_scale: () float32 on the device: what the gradients are multiplied by.
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
        scale = loss_scale if loss_scale is not None else getattr(self, "grad_scale", None)
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
                    grad_scale=scale,
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
