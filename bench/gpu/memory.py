"""Peak memory of a step beside the plan's count, which `fasttricks plan` refuses runs by."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.child import attempt
from bench.gpu.clock import device_of, wait
from bench.gpu.parts import Job, Row
from bench.gpu.steps import OURS, cases, free
from bench.step import CONTESTANTS, StepCase
from fasttricks.planning.footprint import footprint
from fasttricks.planning.planner import IMAGENET_CLASSES
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World

SETTLED = 3
"""Steps before the one whose peak is taken: momenta and masters are there, and cuDNN has chosen."""
GIB = 2**30


def measure(job: Job) -> Iterator[Row]:
    """A row for each network and batch, eager, deterministic."""
    for case in cases(job):
        yield from attempt({"model": case.model, "batch": case.batch_size}, partial(_row, case))
        free(device_of(job.device))


def _row(case: StepCase) -> Iterator[Row]:
    device = device_of(case.device)
    ask_for_one_order(device, on=True)
    row = {f"{name}, GiB": value / GIB for name, value in peak_of(case, device).items()}
    counted = footprint(case.config, case.shards, IMAGENET_CLASSES).at_peak
    row |= {"plan, GiB": counted.total() / GIB}
    if device.type == "cuda":
        row["peak / plan"] = row["peak, GiB"] / row["plan, GiB"]
        row["reserved / plan"] = row["reserved, GiB"] / row["plan, GiB"]
    yield row | {f"plan: {kind}, GiB": size / GIB for kind, size in counted.items()}


def peak_of(case: StepCase, device: torch.device) -> dict[str, int]:
    """Bytes by name: of live tensors and of the allocator at the peak, and of the card by all; on the CPU the process's own."""
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
    labels = torch.randint(0, IMAGENET_CLASSES, (case.batch_size,), device=device)
    step = CONTESTANTS[OURS](case, World.alone(device), images, labels)
    del images  # the step has its own, in its dtype
    for _ in range(1 if device.type == "cpu" else SETTLED):
        step()
    wait(device)
    if device.type == "cpu":
        return {"resident in the process at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    wait(device)
    free_bytes, total = torch.cuda.mem_get_info(device)
    return {
        "peak": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "used on the card": total - free_bytes,
    }
