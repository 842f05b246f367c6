"""Training as a run does it, loader and step together, beside each of them alone. Real runs, put together by build()."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch

from bench.pairs import Row
from fasttricks.config import TrainConfig
from fasttricks.data.batch import Batch
from fasttricks.system.distributed import World
from fasttricks.trainer import train_step
from fasttricks.training.build import build
from fasttricks.training.run import Run

TOGETHER, LOADER, STEP = "fasttricks, loader and step", "its loader alone", "its step alone"


def contestants(config: TrainConfig, world: World, folder: Path, images: int) -> dict[str, Callable[[], float]]:
    """Name -> a turn over about `images` images, returning images a second. `folder` takes the run folder."""
    run = build(dataclasses.replace(config, run_dir=str(folder / "run")), world)
    feed, steps = _endless(run), max(3, images // config.global_batch_size)
    kept = next(feed)

    def together() -> None:
        for batch in islice(feed, steps):
            _step(run, batch)

    def loader() -> None:
        for _ in islice(feed, steps):
            pass

    def step() -> None:
        for _ in range(steps):
            _step(run, kept)

    def timed(work: Callable[[], None], *, feeds: bool) -> Callable[[], float]:
        def measure() -> float:
            if feeds:  # batches made ahead of the round do not count
                for _ in islice(feed, config.data.prefetch + 1):
                    pass
            start = time.perf_counter()
            work()
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            rate = steps * len(kept.labels) / (time.perf_counter() - start)
            time.sleep(0.3)  # let the decoding threads, which work ahead, come to rest
            return rate

        return measure

    return {TOGETHER: timed(together, feeds=True), LOADER: timed(loader, feeds=True), STEP: timed(step, feeds=False)}


def _step(run: Run, batch: Batch) -> None:
    train_step(run, [batch])
    run.step = 0  # the schedule's end is not to be reached


def _endless(run: Run) -> Iterator[Batch]:
    """Full batches, epoch after epoch."""
    size = run.config.micro_batch_size(run.world.size)
    while True:
        yield from (batch for batch in run.train_loader if len(batch) == size)


def bounds(rows: list[Row], cores: int, *, shared: bool) -> str:
    """The whole over the slower of its parts and, where both use the same cores, over the share that each has of them."""
    together, loader, step = (row.rates for row in rows)
    of_slower = [whole / min(a, b) for whole, a, b in zip(together, loader, step, strict=True)]
    of_shared = [whole * (1 / a + 1 / b) for whole, a, b in zip(together, loader, step, strict=True)]
    text = f"end to end is {_spread(of_slower)} of the slower of loader and step"
    if not shared:
        return text
    return f"{text}; both work on the same {cores} cores, of the rate that their times added up allow it is {_spread(of_shared)}"


def _spread(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.1%} ({min(values):.1%} to {max(values):.1%})"
