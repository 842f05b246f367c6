"""`python -m bench.batch_norm`: batch_norm_act on the CPU beside torch's batch norm, addition and ReLU, at a ResNet-50's shapes.

Forward and backward, in alternation in one process. The bound is the passes over memory at the speed of a copy. Let freed memory
be kept, as a long run keeps it: in glibc by MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ of 100000000000.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from fasttricks_kernels import batch_norm_act

SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (1024, 14), (2048, 7))
"""Channels and side."""


def calls(shape: tuple[int, int, int, int], with_residual: bool) -> dict[str, Callable[[], object]]:
    """A step of ours and of torch's, and a copy of x."""
    x, residual, grad, copied = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(4))
    weight, bias = (torch.ones(shape[1], requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    leaves = [x.requires_grad_(), weight, bias, *([residual.requires_grad_()] if with_residual else [])]

    def ours() -> tuple[Tensor, ...]:
        added = residual if with_residual else None
        y = batch_norm_act(
            x, weight, bias, mean, var, residual=added, act="relu", training=True, momentum=0.1, eps=1e-5
        )
        return torch.autograd.grad(y, leaves, grad)

    def torchs() -> tuple[Tensor, ...]:
        y = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
        y = y + residual if with_residual else y
        return torch.autograd.grad(F.relu(y, inplace=True), leaves, grad)

    return {"ours": ours, "torch": torchs, "copy": lambda: copied.copy_(x.detach())}


def times(works: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each turn, after one that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                spent[name].append(1e3 * (time.perf_counter() - began))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description="batch_norm_act on the CPU beside torch, as Markdown.")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--turns", type=int, default=11, help="steps of each, in alternation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| channels x side | residual | ours, ms | torch, ms | torch / ours | torch / bound |")
    print("|---|---|---|---|---|---|")
    for channels, side in SHAPES:
        for with_residual in (False, True):
            spent = times(calls((options.batch, channels, side, side), with_residual), options.turns)
            passes = 4 + 7 if with_residual else 3 + 5
            bound = passes / 2 * median(spent["copy"])
            ratio = median(b / a for a, b in zip(spent["ours"], spent["torch"], strict=True))
            print(
                f"| {channels} x {side} | {'yes' if with_residual else 'no'} | {median(spent['ours']):.1f} "
                f"| {median(spent['torch']):.1f} | {ratio:.2f} | {median(spent['torch']) / bound:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
