"""The requests for one order of every sum on a GPU. The JPEGs' decoder has its own: data.pipeline.loader's hw_decoder_load."""

from __future__ import annotations

import os

import torch

WORKSPACE = ":4096:8"
"""For CUBLAS_WORKSPACE_CONFIG: 8 buffers of 4 MiB, one of the two values with which cuBLAS promises the same bits on several
streams. torch accepts no third."""


def ask_for_one_order(device: torch.device, *, on: bool, compiled: bool = False) -> None:
    """Ask torch, cuDNN, cuBLAS and inductor for the same bits at every repetition, or let cuDNN choose by time.

    Once a process, before its first matrix product on the GPU: cuBLAS and torch read CUBLAS_WORKSPACE_CONFIG then, and torch
    warns where it comes too late. It holds for the rest of the process.

    device: where the process computes. The CPU's kernels have one order for a number of threads and need no request. on:
    deterministic algorithms, and a UserWarning by torch, once, for an operator that has none: a network of timm may hold one,
    those of this project hold none of torch's list. Off: `cudnn.benchmark`, the fastest of cuDNN's algorithms, timed at the
    first batch of each size. compiled: the process compiles; inductor is told too, which takes seconds to import.

    It is a request, and no test on a GPU has shown its result yet.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = on, not on
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    # else each torch.empty() is filled with NaN first: a pass over memory that our operators write whole
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if compiled:
        torch.use_deterministic_algorithms(on, warn_only=True)
    else:  # the same without inductor
        torch.set_deterministic_debug_mode("warn" if on else "default")
