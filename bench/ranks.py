"""The cost of the same bits on three and more ranks: steps that sum gradients in the ranks' order, alternating with all-reduce.

    python -m bench.ranks

ResNet-18 of 11 million weights, forward and backward, on ranks of this machine joined by gloo.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.soak.processes import free_port
from fasttricks.config import ModelConfig, Range, check_fields
from fasttricks.config.cli import parse
from fasttricks.models import build_model
from fasttricks.runs.folder import versions, write_json
from fasttricks.system.command import run_main
from fasttricks.system.distributed import World, cpu_name, join_world, keep_freed_memory
from fasttricks.system.rank_order import average_in_rank_order

OUT = Path(__file__).parent / "out" / "ranks.json"
"""The committed figures are beside it, in results/."""
WAYS = ("all_reduce", "rank_order")


@dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """How many ranks, steps and images."""

    ranks: tuple[int, ...] = (2, 3, 4)
    """Numbers of ranks, one after another; a run of two takes the backend's sum, whose order is the same."""
    steps: Annotated[int, Range(1)] = 20
    """Steps of each way, in alternation."""
    images: Annotated[int, Range(1)] = 8
    """Images of a rank, 32 pixels."""
    output: str = str(OUT)
    """JSON file to write."""

    def __post_init__(self) -> None:
        check_fields(self)


def measure(rank: int, size: int, port: int, config: RanksConfig, output: Path) -> None:
    """Rank 0 writes the seconds of each step, by way, to `output`; the first two of each way are not counted."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}})
    torch.set_num_threads(1)
    keep_freed_memory()
    with join_world("cpu") as world:
        models = {way: _model(world, way) for way in WAYS}
        images = torch.randn(config.images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(2 + config.steps):
            for way, model in models.items():
                world.barrier()
                started = time.perf_counter()
                model(images).sum().backward()
                world.barrier()
                seconds[way].append(time.perf_counter() - started)
        if world.is_main:
            write_json(output, {way: times[2:] for way, times in seconds.items()})


def _model(world: World, way: str) -> nn.Module:
    network = build_model(ModelConfig(name="resnet18d", stem_stride=1), 10).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(network, gradient_as_bucket_view=True, static_graph=True)
    if way == "rank_order":
        average_in_rank_order(model, world)
    return model


def main(args: list[str]) -> None:
    """Time each number of ranks, print the medians and write them."""
    config = parse(RanksConfig(), args, prog="python -m bench.ranks", description="Time the ranks' order of sums.")
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": f"{cpu_name()}, {os.cpu_count()} cores", "versions": versions(), "ranks": {}}
    for size in config.ranks:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "seconds.json"
            mp.spawn(measure, (size, free_port(), config, file), size)
            seconds = json.loads(file.read_text())
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        ratio = statistics.median(b / a for a, b in zip(*(seconds[way] for way in WAYS), strict=True))
        found["ranks"][str(size)] = {**medians, "ratio": ratio, "seconds": seconds}
        print(f"{size} ranks: {medians['all_reduce']:.3f} s, in order {medians['rank_order']:.3f} s, x {ratio:.2f}")
        write_json(Path(config.output), found)


if __name__ == "__main__":
    run_main(main)
