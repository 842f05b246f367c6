"""`python -m bench.batch_norm`: batch_norm_act on the CPU beside torch's batch norm, addition and ReLU, at a ResNet-50's shapes.

Forward and backward, in alternation in one process, which keeps freed memory as a run does. The bound is the passes over memory
at the speed of a copy. With --small the CPU time at small shapes, where the call costs more than the passes; take one thread.
With --step the whole training step of a network by `--model.norm fused` and `torch`, in wall time and in the process's CPU time,
which other work changes less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.step import StepCase
from fasttricks.config import replace_at
from fasttricks.data.batch import Batch
from fasttricks.learning.learner import make_learner
from fasttricks.learning.placement import place
from fasttricks.models import build_model
from fasttricks.planning.planner import IMAGENET_CLASSES
from fasttricks.system.distributed import World, keep_freed_memory
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step
from fasttricks_kernels import batch_norm_act

CPU = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SMALL = ((64, 8), (32, 16), (64, 16), (128, 16), (256, 16), (512, 16))
"""Likewise, of 8 images: 32,768 to 1,048,576 values."""
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


def times(
    works: dict[str, Callable[[], object]], turns: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds of each turn by `clock`, after one that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            began = clock()
            work()
            if turn:
                spent[name].append(1e3 * (clock() - began))
    return spent


def time_small(turns: int) -> None:
    """Print the process's CPU time for tensors of few values."""
    print("| values | residual | ours, us | torch, us | torch / ours |\n|---|---|---|---|---|")
    for channels, side in SMALL:
        for with_residual in (False, True):
            works = calls((8, channels, side, side), with_residual)
            spent = times({name: works[name] for name in ("ours", "torch")}, turns, time.process_time)
            ours, torchs = (1e3 * median(spent[name]) for name in spent)
            values = f"{8 * channels * side**2:,}"
            print(
                f"| {values} | {'yes' if with_residual else 'no'} | {ours:.0f} | {torchs:.0f} | {torchs / ours:.2f} |"
            )


def training_step(case: StepCase, norm: str) -> Callable[[], object]:
    """train_step of the network with this batch norm, on random images; torch's seed decides the weights."""
    config = replace_at(case.config, "model.norm", norm)
    model = place(build_model(config.model, IMAGENET_CLASSES), CPU, config.precision)
    learner = make_learner(find_task(config.task), config, CPU, case.shards, model)
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size).to(memory_format=torch.channels_last)
    batch = Batch(images, torch.randint(IMAGENET_CLASSES, (case.batch_size,)))
    return lambda: train_step(learner, [batch])


def time_steps(case: StepCase, turns: int) -> None:
    """Print the seconds of a step of each, and the ratio in each pair of steps: its median, lowest and highest."""
    steps = {norm: training_step(case, norm) for norm in ("fused", "torch")}
    wall, cpu = ({norm: [] for norm in steps} for _ in range(2))
    for turn in range(turns + 1):
        for norm, step in steps.items():
            began = time.perf_counter(), time.process_time()
            step()
            if turn:
                wall[norm].append(time.perf_counter() - began[0])
                cpu[norm].append(time.process_time() - began[1])
    print(f"{case.title}\n\n| seconds | fused | torch | torch / fused |\n|---|---|---|---|")
    for name, spent in (("wall", wall), ("CPU", cpu)):
        ratios = sorted(b / a for a, b in zip(spent["fused"], spent["torch"], strict=True))
        ours, theirs = (f"{median(spent[norm]):.2f}" for norm in steps)
        print(f"| {name} | {ours} | {theirs} | {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) |")


def main() -> None:
    parser = argparse.ArgumentParser(description="batch_norm_act on the CPU beside torch, as Markdown.")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--turns", type=int, default=11, help="steps of each, in alternation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="small shapes, by CPU time")
    parser.add_argument("--step", metavar="MODEL", help="the whole step of this network")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    if options.small:
        time_small(options.turns)
        return
    if options.step:
        time_steps(StepCase(model=options.step, batch_size=options.batch), options.turns)
        return
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
