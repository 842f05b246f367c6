"""Time of work on a device: by the device's own events on a GPU, by the host's clock on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_AHEAD = 2.0
"""How much longer the device is kept waiting than the host took to launch the same work before."""
_LONGEST_S = 0.5
_CYCLES_PER_S = 2.0e9
"""Cycles of torch.cuda._sleep a second, about: no card's clock is much above it, so the wait is no shorter than asked for."""


def device_of(name: str) -> torch.device:
    """The torch device for cuda or cpu, with its number, as a run has it: tensors say `cuda:0`."""
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def wait(device: torch.device) -> None:
    """Until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(work: Callable[[], object], device: torch.device, passes: int = 10) -> float:
    """Mean seconds of a pass of `work`, which never waits for the device, over so many in a row.

    On a GPU between two events of its stream. The first is held back until the host has launched all of the passes (a few
    hundred kernels at most: a stream holds 1,024), so the time of launching is no part of it.
    """
    wait(device)
    started = time.perf_counter()
    if device.type != "cuda":
        for _ in range(passes):
            work()
        return (time.perf_counter() - started) / passes
    for _ in range(passes):
        work()
    launching = time.perf_counter() - started
    wait(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(min(_AHEAD * launching, _LONGEST_S) * _CYCLES_PER_S))
    begin.record()
    for _ in range(passes):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / passes


def host_seconds(work: Callable[[], object], device: torch.device, passes: int = 5) -> float:
    """Median seconds that the host takes to launch `work`: each time from an idle device, without waiting for its end."""
    taken = []
    for _ in range(passes):
        wait(device)
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    wait(device)
    return statistics.median(taken)
