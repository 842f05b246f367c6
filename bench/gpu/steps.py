"""The training step, ours and timm's with the same settings of cuDNN, on one device in one process; they alternate.

Images a second by the host's clock over several steps, from an idle device to its end; and the time in which the host launches
one step, which is the step's floor where the device is faster.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal
from unittest import mock

import torch

from bench.gpu.child import attempt
from bench.gpu.clock import device_of, host_seconds, wait
from bench.gpu.parts import Job, Row, is_installed
from bench.step import FUSED, GRAPHED, MAKERS, StepCase
from fasttricks.planning.planner import IMAGENET_CLASSES
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World

OURS, TIMM = "fasttricks", "timm, channels-last"
MODELS, BATCHES = ("resnet50d", "resnet50b"), (128, 256)
SETTINGS: tuple[Literal["on", "off"], ...] = ("on", "off")
SMALL_BATCHES = (16, 64, 128)
ROUNDS, STEPS = 5, 20
Step = Callable[[], None]


def cases(job: Job) -> list[StepCase]:
    """The networks and batches, the paper's FP16. The walk takes FP32: convolutions in FP16 take the CPU seconds."""
    if job.tiny:
        return [StepCase(model="mobilenet_v1", batch_size=2, image_size=32, device="cpu")]
    return [
        StepCase(model=model, precision="fp16", batch_size=size, device="cuda") for model in MODELS for size in BATCHES
    ]


def eager(job: Job) -> Iterator[Row]:
    """Rows of each case, deterministic on and off."""
    return _rows(job, compiled=False)


def compiled(job: Job) -> Iterator[Row]:
    """The same with torch.compile, whose minutes may end the part early: the first case's rows come first."""
    if job.tiny:  # its C++ compiler would take minutes
        with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
            yield from _rows(job, compiled=True)
    else:
        yield from _rows(job, compiled=True)


def graphed(job: Job) -> Iterator[Row]:
    """Rows of batches that the host holds back: launched with torch's batch norm and the fused, and replayed; cuDNN's fastest."""
    for size in (2,) if job.tiny else SMALL_BATCHES:
        case = replace(cases(job)[0], batch_size=size, deterministic="off")
        columns = {"model": case.model, "batch": size}
        yield from attempt(columns, partial(compare, case, tiny=job.tiny, names=(OURS, FUSED, GRAPHED)))
        free(device_of(job.device))


def _rows(job: Job, *, compiled: bool) -> Iterator[Row]:
    for case in cases(job):
        for deterministic in SETTINGS[-1:] if job.tiny and compiled else SETTINGS:
            columns = {
                "model": case.model,
                "batch": case.batch_size,
                "compile": compiled,
                "deterministic": deterministic,
            }
            now = replace(case, compiled=compiled, deterministic=deterministic)
            yield from attempt(columns, partial(compare, now, tiny=job.tiny))
            free(device_of(job.device))


def contestants(case: StepCase) -> tuple[str, ...]:
    """Ours and, where it is installed, timm's."""
    end = ", torch.compile" if case.compiled else ""
    return tuple(name + end for name in (OURS, *([TIMM] if is_installed("timm") else [])))


def steps_of(case: StepCase, names: Sequence[str]) -> dict[str, Step]:
    """Name -> a training step on images that lie on the device."""
    device = device_of(case.device)
    torch.manual_seed(0)
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
    labels = torch.randint(0, IMAGENET_CLASSES, (case.batch_size,), device=device)
    return {name: MAKERS[name](case, World.alone(device), images, labels) for name in names}


def compare(case: StepCase, *, tiny: bool, names: Sequence[str] = ()) -> Iterator[Row]:
    """A row for each contestant, contestants() where no names are given: rates are medians of the rounds, ratios to the first
    those within a round."""
    device = device_of(case.device)
    ask_for_one_order(device, on=case.deterministic == "on", compiled=case.compiled)  # for both
    steps = steps_of(case, names or contestants(case))
    rounds, repeats = (1, 1) if tiny else (ROUNDS, STEPS)
    started = time.perf_counter()
    for step in steps.values():  # finds cuDNN's algorithms, compiles, makes the optimizer's state
        for _ in range(1 if tiny else 3):
            step()
    wait(device)
    ready = time.perf_counter() - started
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        names = list(steps)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            rates[name].append(rate(steps[name], device, case.batch_size, repeats))
    for name, taken in rates.items():
        middle = statistics.median(taken)
        ratio = statistics.median(a / b for a, b in zip(next(iter(rates.values())), taken, strict=True))
        row: Row = {
            "contestant": name,
            "imgs/sec": middle,
            "ours / this": ratio,
            "ms a step": case.batch_size / middle * 1e3,
        }
        row["host ms a step"] = 1e3 * host_seconds(steps[name], device, 1 if tiny else 5)
        yield row | {"lowest": min(taken), "highest": max(taken), "s until ready, both": ready}


def rate(step: Step, device: torch.device, images: int, repeats: int) -> float:
    """Images a second over so many steps in a row."""
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    return repeats * images / (time.perf_counter() - started)


def free(device: torch.device) -> None:
    """Give the device's memory back, so that the next case has all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
