"""CPU time of an image in each loader: a figure that other work on the machine hardly changes, unlike images a second.

python -m bench.cost --root DIR/train
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Annotated, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench import loader
from bench.pairs import processes
from fasttricks.config import Range, check_fields
from fasttricks.config.cli import parse
from fasttricks.data.sources.folder import scan_folder
from fasttricks.system.command import run_main

COUNTED = 5
"""Batches of a turn that count, after loader.SKIPPED that do not."""


class Cost(NamedTuple):
    """One loader's medians over the rounds; ratios are the first loader's over its, or its rate over the first's."""

    cpu_ms: float
    """CPU time of an image, ms, user and system, of this process and those it started."""
    cpu_ratio: float
    rate: float
    """Images a second."""
    rate_ratio: float


@dataclass(frozen=True, kw_only=True)
class Config:
    """The measurements."""

    root: str
    """Folder of a folder of images a class, such as DIR/train."""
    rounds: Annotated[int, Range(1)] = 3
    """Turns of each loader."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(args: list[str]) -> None:
    """Measure and print the table."""
    config = parse(Config(root=""), args, prog="python -m bench.cost", description=__doc__ or "")
    workers, folder = len(os.sched_getaffinity(0)), scan_folder(config.root)
    times = repeats(len(folder))
    longer = dataclasses.replace(folder, files=folder.files * times, labels=folder.labels * times)
    loaders = {
        "torchvision, same colour": loader.torchvision(folder.root, workers, times),
        "fasttricks, paper's colour": loader.fasttricks(longer, workers),
        "the same with DALI's operators": loader.fasttricks(longer, workers, "dali"),
        loader.FLOOR: loader.Decoder(longer, workers),
    }
    costs = measure(loaders, config.rounds)
    table = Table("", "CPU ms an image", "torchvision / this", "of the decoder", title=str(folder.root))
    for name, cost in costs.items():
        of_floor = costs[loader.FLOOR].cpu_ms / cost.cpu_ms
        table.add_row(name, f"{cost.cpu_ms:.2f}", f"{cost.cpu_ratio:.2f}", f"{of_floor:.2f}")
    Console().print(table)


def repeats(images: int) -> int:
    """How often a folder must be taken for a turn."""
    return -(-(loader.SKIPPED + COUNTED + 1) * loader.BATCH_SIZE // images)


def measure(loaders: Mapping[str, Iterable[Any]], rounds: int) -> dict[str, Cost]:
    """The costs of alternating loaders."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, batches in loaders.items():
            turns[name].append(_turn(batches))
    first = next(iter(turns.values()))
    return {
        name: Cost(
            statistics.median(cpu for cpu, _ in taken),
            statistics.median(a[0] / b[0] for a, b in zip(first, taken, strict=True)),
            statistics.median(rate for _, rate in taken),
            statistics.median(b[1] / a[1] for a, b in zip(first, taken, strict=True)),
        )
        for name, taken in turns.items()
    }


def _turn(batches: Iterable[Any]) -> tuple[float, float]:
    """(CPU ms an image, images a second) over COUNTED batches."""
    images, cpu, start, seconds = 0, 0.0, 0.0, 0.0
    endless = chain.from_iterable(repeat(batches))  # ours continues where its last round ended
    for index, batch in enumerate(endless):
        if index >= loader.SKIPPED:
            images += loader.count_images(batch)
        if index == loader.SKIPPED - 1:
            cpu, start = _cpu_seconds(), time.perf_counter()
        if index == loader.SKIPPED + COUNTED - 1:
            cpu, seconds = _cpu_seconds() - cpu, time.perf_counter() - start
            break
    _rest()
    return cpu / images * 1e3, images / seconds


def _rest() -> None:
    """Wait until threads that work ahead have come to rest, so that the next round is not charged for them."""
    before, now = 0.0, _cpu_seconds()
    while now - before > 0.01:
        time.sleep(0.5)
        before, now = now, _cpu_seconds()


def _cpu_seconds() -> float:
    """User and system time of this process and of the processes below it."""
    parents, used = {}, {}
    for pid, fields in processes():
        parents[pid] = int(fields[1])
        used[pid] = int(fields[11]) + int(fields[12])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    below.discard(os.getpid())
    return time.process_time() + sum(used.get(pid, 0) for pid in below) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run_main(main)
