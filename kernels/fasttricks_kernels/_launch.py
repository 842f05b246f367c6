"""Shared by all launches: who runs Triton, which device, how a tile of rows is cut."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# The namespace of every operator here: torch.ops.fasttricks_kernels.<name>.
NAMESPACE = "fasttricks_kernels"

INTERPRETED: bool = triton.knobs.runtime.interpret  # as triton.jit decides: once, when the kernels are imported

# Options of every launch. No fused multiply-add: the GPU then rounds where the interpreter does, whatever Triton's default is.
PINNED = {"enable_fp_fusion": False}

TILE = 1024  # elements a program holds at least: 4 warps x 32 lanes x 8 values, 16 bytes a lane in FP16
BLOCK = 4096  # columns of one chunk; longer rows are cut in chunks, not padded to a power of two
HELD_BYTES = 98304  # rows held in registers, of 262,144 bytes a multiprocessor; longer rows are read again
WIDEST_BYTES = 16  # widest load or store instruction
SHIFTED_ROW_BYTES = 1024  # below, a row's two ends cost more than its few wide accesses save


def _let_interpreted_kernels_loop() -> None:
    """A loop's bound is an array of one element there. Before Triton 3.8 it takes int() of that, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _let_interpreted_kernels_loop()


def runs_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel serves this tensor: on CUDA, and under Triton's interpreter. Never float64."""
    return tensor.dtype != torch.float64 and (tensor.is_cuda or INTERPRETED)


NO_CHANGE: AbstractContextManager[None] = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context: launch on the tensor's GPU, not on the current one. Does nothing for that one, and for a CPU tensor."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return NO_CHANGE
    return torch.cuda.device_of(tensor)


def broadcast_stride(per_sample: Tensor | None) -> int:
    """Elements from one sample's value to the next: 0 where one value serves the whole batch."""
    return 0 if per_sample is None or per_sample.dim() == 0 else per_sample.stride(0)


def tile_of_rows(rows: Tensor, rows_held: int = 1) -> dict[str, int | bool]:
    """How a kernel cuts (N, K) rows: its compile-time constants and launch options.

    Short rows share a program, so that the reads of a program (a loss scale) stay below 0.5 % of the traffic.
    A contiguous long row whose length is no multiple of 16 bytes is SHIFTED: lane 0 sits on the 16-byte boundary at
    or before it, because otherwise every access is as narrow as one element.
    """
    return _tile(rows.shape[1], rows.stride(0), rows.element_size(), rows_held)


@functools.lru_cache(maxsize=1024)
def _tile(num_columns: int, stride: int, size: int, rows_held: int) -> dict[str, int | bool]:
    """Kept: it takes as long as all else that a launch does here."""
    group = WIDEST_BYTES // size
    shifted = stride == num_columns and num_columns % group != 0 and num_columns * size >= SHIFTED_ROW_BYTES
    lanes = num_columns + (group - 1 if shifted else 0)
    long = lanes > BLOCK
    held_block = BLOCK // rows_held if long else BLOCK
    held = triton.cdiv(lanes, held_block) * held_block * size * rows_held <= HELD_BYTES
    block = min(triton.next_power_of_2(lanes), held_block if held else BLOCK)
    tile = max(block, TILE)
    roomy = long and held and (rows_held == 2 or size == 2)  # few warps, whose threads have many registers
    return {
        "K": num_columns,
        "STRIDE": stride,
        "ROWS": tile // block,
        "BLOCK": block,
        "CHUNKS": triton.cdiv(lanes, block),
        "HELD": held,
        "GROUP": group,
        "SHIFTED": shifted,
        **PINNED,
        # By registers; untuned, for want of a GPU to time it on. Not told how many it may take, the assembler aims at
        # fewer and spills: at 128 where a long row takes few warps, at 56 or 48 where a short one is shifted.
        "num_warps": 4 if not long else 8 if roomy else 16,
        "maxnreg": 255 if roomy else 64 if shifted and not long and rows_held == 1 else None,
    }


def dense_rows(rows: Tensor) -> Tensor:
    """The same (N, K) rows with unit column stride and rows that do not overlap; copied only where they are not."""
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()
