"""The kernels of a training step by torch.profiler: the longest, those of batch norm, and every copy, cast or layout change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.gpu.child import attempt
from bench.gpu.clock import device_of, wait
from bench.gpu.parts import Job, Row
from bench.gpu.steps import cases, contestants, free, steps_of
from bench.step import StepCase
from fasttricks.system.determinism import ask_for_one_order

STEPS, LONGEST, CHARACTERS = 3, 10, 120
KINDS = {
    "batch norm": re.compile(
        r"batch_?norm|bn_(?:fw|bw)|::bn|norm_(?:fw|bw)|statistics_kernel|normalise_kernel|gradient\w*_kernel", re.I
    ),
    "copy, cast or layout": re.compile(
        r"memcpy|copy|cast|convert|nchwtonhwc|nhwctonchw|transpose|_to_copy|contiguous", re.I
    ),
}
"""Kind -> the names of its kernels, as far as they tell."""


def measure(job: Job) -> Iterator[Row]:
    """Rows of the first case, ours and timm's: the ten longest kernels, then those of KINDS, then all together."""
    for contestant in ("fasttricks", "timm, channels-last"):
        yield from attempt(
            {"contestant": contestant}, partial(_rows, cases(job)[0], contestant, 1 if job.tiny else STEPS)
        )
        free(device_of(job.device))


def _rows(case: StepCase, contestant: str, recorded: int) -> Iterator[Row]:
    device = device_of(case.device)
    ask_for_one_order(device, on=True)
    steps = steps_of(case, contestants(case))
    if contestant not in steps:
        yield {"note": "left out: not installed"}
        return
    step = steps.pop(contestant)
    for _ in range(recorded):
        step()
    wait(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(recorded):
            step()
        wait(device)
    yield from table(profiler.key_averages(), recorded, on_gpu=device.type == "cuda")


def table(averages: Iterable[Any], steps: int, *, on_gpu: bool) -> Iterator[Row]:
    """The rows, of torch.profiler's key_averages(). On the CPU, operators stand in for kernels."""
    device, own = (DeviceType.CUDA, "self_device_time_total") if on_gpu else (DeviceType.CPU, "self_cpu_time_total")
    found = [event for event in averages if event.device_type == device and not event.is_user_annotation]
    found = sorted((event for event in found if getattr(event, own) > 0), key=lambda event: -getattr(event, own))
    whole = sum(getattr(event, own) for event in found)
    for place, event in enumerate(found):
        kind = next((name for name, pattern in KINDS.items() if pattern.search(event.key)), "")
        if place >= LONGEST and not kind:
            continue
        taken = getattr(event, own)
        yield {
            "kernel": event.key[:CHARACTERS],
            "kind": kind,
            "ms a step": taken / 1e3 / steps,
            "share": taken / whole,
            "calls a step": event.count / steps,
        }
    yield {"kernel": f"all {len(found)}", "ms a step": whole / 1e3 / steps, "share": 1.0 if whole else 0.0}
