"""The device code of SGD with masters and of its overflow check, and their launches over a table of addresses."""

# No `from __future__ import annotations`: Triton reads tl.constexpr from annotations.
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import PINNED, on_device_of

BLOCK = 1024  # elements a program updates: with 2048 a thread holds twice as many registers
OVERFLOW_BLOCK = 4096  # elements a program checks
FIELDS = (
    5  # columns of a tensor in the table: the addresses of weight, gradient, master and momentum; the element count
)

TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# ----------------------------------------------------------------------------------------------------- device code


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
    gain,
    weight_decay,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
):
    """g = +-grad / grad_scale + weight_decay w; v = momentum v + gain g; w -= lr (g + momentum v, or v, or g)."""
    grad_B = tl.load(grad_ptr + lane_B, mask=live_B).to(tl.float32)
    if grad_scale_ptr is not None:
        grad_B = grad_B / tl.load(grad_scale_ptr)
    if MAXIMIZE:
        grad_B = -grad_B
    master_B = tl.load(master_ptr + lane_B, mask=live_B)
    grad_B += weight_decay * master_B
    if HAS_MOMENTUM:
        momentum_B = momentum * tl.load(momentum_ptr + lane_B, mask=live_B) + gain * grad_B
        tl.store(momentum_ptr + lane_B, momentum_B, mask=live_B)
        grad_B = grad_B + momentum * momentum_B if NESTEROV else momentum_B
    master_B -= lr * grad_B
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
    gain,
    weight_decay,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
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
                gain,
                weight_decay,
                NESTEROV,
                MAXIMIZE,
                HAS_MASTER,
                HAS_MOMENTUM,
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
                gain,
                weight_decay,
                NESTEROV,
                MAXIMIZE,
                HAS_MASTER,
                HAS_MOMENTUM,
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


# ---------------------------------------------------------------------------------------------------------- launch


@lru_cache(maxsize=64)
def _table(addresses: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(tensors, FIELDS) int64 and (programs, 2) int32 (tensor, block) on the device: rebuilt when an address changes.

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
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
) -> None:
    # A column that the kernel leaves alone repeats the weights'.
    tensors = list(zip(weights, grads, masters or weights, momenta or weights, strict=True))
    _launch(
        sgd_kernel,
        tensors,
        BLOCK,
        grad_scale,
        found_inf,
        lr,
        momentum,
        1 - dampening,
        weight_decay,
        NESTEROV=nesterov,
        MAXIMIZE=maximize,
        HAS_MASTER=len(masters) > 0,
        HAS_MOMENTUM=len(momenta) > 0,
    )


def launch_overflow(grads: list[Tensor]) -> Tensor:
    found = torch.zeros((), dtype=torch.float32, device=grads[0].device)
    _launch(overflow_kernel, [(g, g, g, g) for g in grads], OVERFLOW_BLOCK, found)
    return found
