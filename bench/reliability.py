"""Cost of fault tolerance: seconds in that code over the seconds of the same steps, and imgs/sec with and without.

    python -m bench.reliability --root DIR

One epoch of 200 steps with one save, of the recipe cifar10, in alternation with as many steps that poll nobody, judge no loss and
save nothing. On two ranks the poll alone is timed besides: it is the one part that grows with them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fasttricks import trainer
from fasttricks.config import Range, check_fields
from fasttricks.config.cli import parse
from fasttricks.config.recipes import find_recipe
from fasttricks.data.batch import Batch
from fasttricks.runs.folder import versions, write_json
from fasttricks.system.command import run_main
from fasttricks.system.distributed import Vote, World, cpu_name, keep_freed_memory, resolve_device
from fasttricks.training import build
from fasttricks.training.run import Run, save

OUT = Path(__file__).parent / "out" / "reliability.json"
"""The committed figures are beside it, in results/."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """The training, and its length."""

    root: str = "demo"
    """Data set of fasttricks.train."""
    recipe: str = "cifar10"
    """Its network, batch and tricks."""
    steps: Annotated[int, Range(1)] = 200
    """Steps an epoch, with one save at its end."""
    turns: Annotated[int, Range(1)] = 20
    """Parts that the steps are cut into, each followed by as many steps without."""
    polls: Annotated[int, Range(1)] = 500
    """Polls of two ranks, 10 ms apart less the time of each."""
    output: str = str(OUT)
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_fields(self)


class Clock:
    """Adds up the seconds in the functions that it wraps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return timed


def endless(run: Run) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    while True:
        yield from run.train_loader


def measure(config: CostConfig, run_dir: str) -> dict[str, Any]:
    """The seconds of each part, of the steps, and imgs/sec with over imgs/sec without, a pair a turn."""
    recipe = find_recipe(config.recipe)()
    settings = replace(recipe, data=replace(recipe.data, root=config.root), run_dir=run_dir, compile="off")
    clock, device = Clock(), resolve_device("auto", 0)
    with (
        mock.patch.object(build, "conditions", clock.around("fingerprint", build.conditions)),
        mock.patch.object(build, "find_state", clock.around("search for a checkpoint", build.find_state)),
    ):
        run = build.build(settings, World.alone(device))
    judge, look, poll = run.guard.judge, run.guard.look, run.stop.poll
    per_turn, batches = config.steps // config.turns, endless(run)
    steps_of(run, islice(batches, 5))  # warm
    step_seconds, ratios = 0.0, []
    for turn in range(config.turns):
        run.guard.judge = clock.around("loss guard", judge)  # type: ignore[method-assign]
        run.guard.look = clock.around("loss guard", look)  # type: ignore[method-assign]
        run.stop.poll = clock.around("signal check", poll)  # type: ignore[method-assign]
        seconds = steps_of(run, islice(batches, per_turn))
        if turn == config.turns - 1:
            saving = time.perf_counter()
            clock.around("save", save)(run)
            save_seconds = time.perf_counter() - saving
        step_seconds += seconds
        run.guard.judge = lambda loss, images, step: (loss, (loss.detach(), images))  # type: ignore[method-assign]
        run.guard.look = lambda: None  # type: ignore[method-assign]
        run.stop.poll = lambda: False  # type: ignore[method-assign]
        ratios.append(steps_of(run, islice(batches, per_turn)) / seconds)
    run.log.close(draw=False)
    run.monitor.close()
    saved = next((run.folder / "checkpoints").glob("step-*.pt")).stat().st_size
    share_of_a_save = save_seconds / step_seconds
    low, middle, high = (
        statistics.quantiles(ratios, n=20)[0],
        statistics.median(ratios),
        statistics.quantiles(ratios, n=20)[-1],
    )
    return {
        "seconds": {name: round(seconds, 4) for name, seconds in clock.seconds.items()},
        "step_seconds": round(step_seconds, 2),
        "share_percent": round(100 * sum(clock.seconds.values()) / (step_seconds + save_seconds), 3),
        "ratio": {
            "imgs_per_sec_with_over_without": round(middle / (1 + share_of_a_save), 4),
            "5 %": round(low / (1 + share_of_a_save), 4),
            "95 %": round(high / (1 + share_of_a_save), 4),
        },
        "checkpoint_bytes": saved,
        "device": run.world.device_name,
    }


def steps_of(run: Run, batches: Iterator[Batch]) -> float:
    """Train on these batches as train_epoch does; the seconds that it took."""
    started = time.perf_counter()
    for batch in batches:
        trainer.train_step(run, [batch])
        if run.step % run.config.log_steps == 0:
            run.guard.look()
        run.stop.poll()
    if run.world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _poll(rank: int, polls: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    world = World(rank=rank, size=2, local_rank=rank, local_size=2, device=torch.device("cpu"))
    vote, seconds = Vote(world), []
    for _ in range(polls):
        started = time.perf_counter()
        vote(False)
        seconds.append(time.perf_counter() - started)
        time.sleep(max(0.0, 0.01 - seconds[-1]))  # a step
    vote.close()
    Path(f"{folder}/rank-{rank}").write_text(str(1e6 * statistics.median(seconds[10:])))
    dist.barrier()
    dist.destroy_process_group()


def main(args: list[str]) -> None:
    """Measure, print and write."""
    config = parse(CostConfig(), args, prog="python -m bench.reliability", description="Cost of fault tolerance.")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(config, f"{folder}/run")
        mp.spawn(_poll, (config.polls, folder), nprocs=2)
        slowest = max(float(Path(f"{folder}/rank-{rank}").read_text()) for rank in range(2))
    found["poll_us_on_2_ranks"] = round(slowest, 1)
    found |= {"steps": config.steps, "recipe": config.recipe, "machine": f"{cpu_name()}, {os.cpu_count()} cores"}
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(config.output), found | {"versions": versions()})
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    run_main(main)
