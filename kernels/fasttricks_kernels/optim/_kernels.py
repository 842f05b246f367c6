"""The device code of SGD with masters and of its overflow check, and their launches over a table of addresses."""

# No `from __future__ import annotations`: Triton reads tl.constexpr from annotations.
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Any, Optional

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import PINNED, on_device_of

BLOCK = 1024  # elements a program updates: with 2048 a thread holds twice as many registers
OVERFLOW_BLOCK = 4096  # elements a program checks

TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit
def block_of(table_ptr, blocks_ptr, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row of the table, its first element there, and whether the tensor's count leaves it whole."""
    row = tl.load(blocks_ptr + 2 * tl.program_id(0)) * FIELDS
    start = tl.load(blocks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    count = tl.load(table_ptr + row)
    return table_ptr + row, start, count


@triton.jit
def at(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer; ALIGNED promises 16 bytes, without which every access is narrow."""
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


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
    lr_ptr,
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
    BLOCK: tl.constexpr,
):
    """Update one block of one tensor; nothing at all where found_inf is set."""
    skip = False
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    if not skip:
        if lr_ptr is not None:
            lr = tl.load(lr_ptr)
        row_ptr, start, count = block_of(table_ptr, blocks_ptr, FIELDS, BLOCK)
        grad = tl.load(row_ptr + 1)
        weight = tl.load(row_ptr + 2)
        master = tl.load(row_ptr + 3) if HAS_MASTER else weight
        momenta = tl.load(row_ptr + FIELDS - 1) if HAS_MOMENTUM else weight
        lane_B = start + tl.arange(0, BLOCK)
        if (start + BLOCK <= count) & (((grad | weight | master | momenta) & 15) == 0):
            # unmasked: a mask against a run-time count would narrow every access
            update_block(
                at(weight, WEIGHT, True),
                at(grad, WEIGHT, True),
                at(master, tl.float32, True),
                at(momenta, tl.float32, True),
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
                at(weight, WEIGHT, False),
                at(grad, WEIGHT, False),
                at(master, tl.float32, False),
                at(momenta, tl.float32, False),
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
    BLOCK: tl.constexpr,
):
    """found = 1 if this block holds a gradient that is not finite. All who write, write 1: no atomic, one outcome."""
    row_ptr, start, count = block_of(table_ptr, blocks_ptr, FIELDS, BLOCK)
    grad = tl.load(row_ptr + 1)
    lane_B = start + tl.arange(0, BLOCK)
    if (start + BLOCK <= count) & ((grad & 15) == 0):
        grad_B = tl.load(at(grad, WEIGHT, True) + lane_B)
    else:
        grad_B = tl.load(at(grad, WEIGHT, False) + lane_B, mask=lane_B < count, other=0.0)
    finite_B = tl.abs(grad_B.to(tl.float32)) < float("inf")  # false for NaN too
    tl.store(found_ptr, 1.0, mask=tl.min(finite_B.to(tl.int32), 0) == 0)


# ---------------------------------------------------------------------------------------------------------- launch


def _device_rows(device: torch.device, numbers: bytes, dtype: str, columns: int) -> Tensor:
    """(rows, columns) numbers of the host on the device."""
    rows = _recorded_rows if _is_recorded(device) else _copied_rows
    return rows(device, numbers, dtype, columns)


def _is_recorded(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)
def _copied_rows(device: torch.device, numbers: bytes, dtype: str, columns: int) -> Tensor:
    """Copied from pinned memory, so that the host does not wait."""
    rows = _rows(numbers, dtype, columns)
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


@cache
def _recorded_rows(device: torch.device, numbers: bytes, dtype: str, columns: int) -> Tensor:
    """For a launch that is recorded: copied now, on a stream that is not, and kept for its replays. Some 100 KB each.

    A copy that is recorded would read the host's memory again in each replay, when it may long hold something else.
    """
    with torch.cuda.stream(torch.cuda.Stream(device)):
        return _rows(numbers, dtype, columns).to(device)


def _rows(numbers: bytes, dtype: str, columns: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(numbers), dtype).reshape(-1, columns))


@lru_cache(maxsize=64)
def _blocks(counts: bytes, block: int) -> bytes:
    """(programs, 2) int32: the tensor of each program and its block there, for tensors of these element counts."""
    programs = -(-np.frombuffer(counts, np.int64) // block)
    tensors = np.repeat(np.arange(len(programs)), programs)
    firsts = np.cumsum(programs) - programs
    return np.stack([tensors, np.arange(len(tensors)) - firsts[tensors]], 1).astype(np.int32).tobytes()


def _launch(kernel: Any, lists: Sequence[Sequence[Tensor]], block: int, *arguments: Any, **options: Any) -> None:
    """Launch over the tensors of each list; those of the first, of one dtype, are the weights or their gradients.

    The table has a row a tensor: its element count, and its address in each list. It is copied again where an address changed;
    the programs' blocks, thousands, only where a count did.
    """
    firsts = lists[0]
    fields, num_tensors, device = 1 + len(lists), len(firsts), firsts[0].device
    columns = chain(map(Tensor.numel, firsts), *(map(Tensor.data_ptr, tensors) for tensors in lists))
    table = np.fromiter(columns, np.int64, fields * num_tensors).reshape(fields, num_tensors)
    numbers = _blocks(table[0].tobytes(), block)
    if not numbers:
        return
    with on_device_of(firsts[0]):
        blocks = _device_rows(device, numbers, "int32", 2)
        kernel[(len(blocks),)](
            _device_rows(device, table.T.tobytes(), "int64", fields),
            blocks,
            *arguments,
            WEIGHT=TRITON_TYPES[firsts[0].dtype],
            FIELDS=fields,
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
    device_lr: Optional[Tensor] = None,
) -> None:
    _launch(
        sgd_kernel,
        [grads, weights, *filter(None, (masters, momenta))],
        BLOCK,
        grad_scale,
        found_inf,
        device_lr,
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
    _launch(overflow_kernel, [grads], OVERFLOW_BLOCK, found)
    return found
