"""Parameters, multiply-adds, bytes and step time of networks: fasttricks cost [--networks NAME ...]."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fasttricks.commands import prog
from fasttricks.config import (
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    Precision,
    Range,
    ScheduleConfig,
    TrainConfig,
    check_fields,
    model_info,
    require,
)
from fasttricks.system.extras import require_extra
from fasttricks.system.files import check_writable

if TYPE_CHECKING:
    from fasttricks.system.distributed import World

PROG = prog("cost")
MB = 1e6
NUM_CLASSES = 1000
PAPER = {"resnet50d": (1.13, 1.03)}
"""Network -> FLOPs and time relative to ResNet-50-A's in the paper (section 4), on V100s."""


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """The networks to compare, and how."""

    networks: tuple[str, ...] = (
        *("resnet50a", "resnet50b", "resnet50c", "resnet50d", "inception_v3", "mobilenet_v1", "resnet50d+resnet152d"),
    )
    """Names as of --model.name; STUDENT+TEACHER is a distillation's step. The others are compared with the first."""
    batch_size: Annotated[int, Range(1, 65_536)] = 4
    """Images a step."""
    image_size: Annotated[int, Range(1, 8192, zero="the network's own", unit="pixels")] = 0
    """Side of the images; each network's own is 299 for Inception-V3 and 224 for the others."""
    rounds: Annotated[int, Range(1, 1000, zero="only count")] = 9
    """Timed steps of each network, after two that are not timed."""
    precision: Precision = "auto"
    """auto: fp16 on CUDA, fp32 on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where a GPU is available, else cpu."""
    output: str = ""
    """Write the table and its plot to OUTPUT.md and OUTPUT.png, which must not exist; empty: only print the table."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.networks) >= 1, "networks", self.networks, "must be one or more")
        require(len(set(self.networks)) == len(self.networks), "networks", self.networks, "must each be named once")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One network's row."""

    name: str
    image_size: int
    num_parameters: int
    multiply_adds: int
    """Multiply-adds of one image's forward pass, with the teacher's."""
    parameter_bytes: int
    activation_bytes: int
    """Live at the step's peak, in which input and gradients have their own share."""
    peak_bytes: int
    """All live tensors at the peak, as footprint.py counts them: without convolution workspace."""
    seconds: tuple[float, ...] = ()
    """Time of each timed step; step i of all networks ran one after another."""


def training(name: str, config: CostConfig, precision: Precision) -> TrainConfig:
    """The training whose step is measured: the paper's loss and optimizer."""
    student = name.partition("+")[0]
    size = config.image_size or model_info(student).image_size
    return TrainConfig(
        recipe="cost",
        epochs=1000,  # a step each: no timed step is near the schedule's end
        global_batch_size=config.batch_size,
        precision=precision,
        data=DataConfig(image_size=size, val_resize=size),
        model=ModelConfig(name=student),
        schedule=ScheduleConfig(warmup_epochs=0),
        loss=LossConfig(smoothing=0.1),
    )


def count(name: str, config: CostConfig, precision: Precision) -> Cost:
    """The counts of a network, without running it. Raises ConfigError for an unknown name."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fasttricks.data.pipeline.shards import Shards
    from fasttricks.models import build_model
    from fasttricks.planning.footprint import footprint

    run = training(name, config, precision)
    teacher = name.partition("+")[2]
    networks = [run.model] + ([ModelConfig(name=teacher)] if teacher else [])
    multiply_adds = 0
    for network in networks:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            build_model(network, NUM_CLASSES).eval()(torch.empty(1, 3, run.data.image_size, run.data.image_size))
        multiply_adds += counter.get_total_flops() // 2
    shards = Shards(num_images=config.batch_size, batch_size=config.batch_size, world_size=1, source="")
    found = footprint(run, shards, NUM_CLASSES, teacher=ModelConfig(name=teacher) if teacher else None)
    return Cost(
        name=name,
        image_size=run.data.image_size,
        num_parameters=found.num_parameters,
        multiply_adds=multiply_adds,
        parameter_bytes=found.at_peak["parameters"],
        activation_bytes=found.at_peak["activations"],
        peak_bytes=found.at_peak.total(),
    )


def make_step(name: str, config: CostConfig, precision: Precision, world: World) -> Callable[[], None]:
    """One train_step of the network on random images that lie on the device, which ends when the device is done."""
    import torch

    from fasttricks.data.pipeline.shards import Shards
    from fasttricks.learning.learner import make_learner
    from fasttricks.learning.placement import place
    from fasttricks.learning.precision import image_dtype
    from fasttricks.learning.teacher import Teacher, teacher_dtype
    from fasttricks.models import build_model
    from fasttricks.tasks import find_task
    from fasttricks.trainer import train_step

    torch.manual_seed(0)
    run, size = training(name, config, precision), config.batch_size
    task = find_task(run.task)
    model = place(build_model(run.model, NUM_CLASSES), world, precision)
    shards = Shards(num_images=size, batch_size=size, world_size=1, source="")
    weights = torch.ones(NUM_CLASSES) if run.loss.class_weights else None
    learner = make_learner(task, run, world, shards, model, class_weights=weights)
    if teacher := name.partition("+")[2]:
        network = build_model(ModelConfig(name=teacher), NUM_CLASSES)
        dtype = teacher_dtype(world.device)
        learner.teacher = Teacher(network, name=teacher, digest="", device=world.device, dtype=dtype)
    dtype = image_dtype(precision, world.device)
    batch = task.example(run, size, NUM_CLASSES, device=world.device, dtype=dtype)

    def step() -> None:
        train_step(learner, [batch])
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    return step


def time_by_turns(steps: Sequence[Callable[[], None]], rounds: int) -> list[tuple[float, ...]]:
    """Seconds of each step in each round: all of them run once a round, so that a machine that drifts is the same for all."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 2):
        for step, row in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if number >= 2:  # memory is given and kernels are chosen in the first two
                row.append(time.perf_counter() - start)
    return [tuple(row) for row in seconds]


def ratio(cost: Cost, first: Cost) -> tuple[float, float, float]:
    """(median, lowest, highest) over the rounds of its time over the first network's in the same round."""
    ratios = [a / b for a, b in zip(cost.seconds, first.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def measure(config: CostConfig, world: World) -> list[Cost]:
    """A row for each network of `config`."""
    import dataclasses

    from fasttricks.learning.precision import check_precision, resolve_precision
    from fasttricks.system.determinism import ask_for_one_order
    from fasttricks.system.triton_build import check_triton

    check_precision(config.precision, world.device)
    ask_for_one_order(world.device, on=True)  # as a run trains by default
    precision = resolve_precision(config.precision, world.device)
    costs = [count(name, config, precision) for name in config.networks]
    if not config.rounds:
        return costs
    check_triton(world.device)
    steps = [make_step(name, config, precision, world) for name in config.networks]
    timed = zip(costs, time_by_turns(steps, config.rounds), strict=True)
    return [dataclasses.replace(cost, seconds=seconds) for cost, seconds in timed]


def table(costs: Sequence[Cost], config: CostConfig) -> str:
    """Markdown."""
    first = costs[0]
    header = ["network", "pixels", "parameters, M", "multiply-adds, G", f"/ {first.name}", "parameters, MB"]
    header += ["activations, MB", "memory peak, MB"]
    timed = bool(first.seconds)
    header += ["ms a step", "imgs/sec", f"time / {first.name}, median (lowest to highest)"] if timed else []
    rows = []
    for cost in costs:
        row = [cost.name, f"{cost.image_size}", f"{cost.num_parameters / 1e6:.2f}", f"{cost.multiply_adds / 1e9:.2f}"]
        row += [f"{cost.multiply_adds / first.multiply_adds:.2f}", f"{cost.parameter_bytes / MB:.1f}"]
        row += [f"{cost.activation_bytes / MB:.1f}", f"{cost.peak_bytes / MB:.1f}"]
        if timed:
            middle, low, high = ratio(cost, first)
            seconds = statistics.median(cost.seconds)
            row += [
                f"{seconds * 1e3:.0f}",
                f"{config.batch_size / seconds:.1f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
            ]
        rows.append(row)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(costs: Sequence[Cost], config: CostConfig, world: World) -> str:
    """The table, with its conditions."""
    from fasttricks.learning.precision import resolve_precision

    precision = resolve_precision(config.precision, world.device)
    parts = [
        f"Training step, batch {config.batch_size}, {precision}, {NUM_CLASSES} classes, on {world.device_name}. Parameters, "
        "multiply-adds (one image, forward) and bytes are counted; "
        + (
            f"times are of {config.rounds} alternating steps of each network."
            if config.rounds
            else "nothing was timed."
        ),
        table(costs, config),
    ]
    known = [cost for cost in costs if cost.name in PAPER and costs[0].name == "resnet50a"]
    for cost in known:
        flops, seconds = PAPER[cost.name]
        parts.append(
            f"The paper, of {cost.name} on V100s: {flops:.2f} x the FLOPs of resnet50a in {seconds:.2f} x its time."
        )
    return "\n\n".join(parts) + "\n"


def plot(costs: Sequence[Cost], path: Path) -> None:
    """Draw multiply-adds and time of each network, relative to the first network's, and the paper's."""
    from fasttricks.planning.cost_chart import Bars, draw

    first = costs[0]
    paper = PAPER if first.name == "resnet50a" else {}
    rows = [Bars(c.name, c.multiply_adds / first.multiply_adds, ratio(c, first), paper.get(c.name)) for c in costs]
    draw(rows, path)


def main(args: Sequence[str]) -> None:
    """Print, and write where asked to, the costs of the networks that `args` name."""
    from fasttricks.config.cli import parse

    config = parse(CostConfig(), args, prog=PROG, description=__doc__ or "")
    files = [Path(f"{config.output}{suffix}") for suffix in (".md", ".png")] if config.output else []
    for file in files:
        if file.exists():
            raise ConfigError(
                f"output = {config.output!r}: {file} already exists and is never overwritten; give another"
            )
    require(
        not files or config.rounds > 0, "rounds", config.rounds, "must be 1 or more for --output: the plot is of times"
    )
    if files:
        check_writable(files[0].parent)
        require_extra("train", ("matplotlib",), f"{PROG} --output")

    from fasttricks.system.distributed import join_world, keep_freed_memory

    keep_freed_memory()
    with join_world(config.device) as world:
        costs = measure(config, world)
        text = report(costs, config, world)
    if files:
        try:
            files[0].write_text(text, "utf-8")
            plot(costs, files[1])
        except OSError as error:
            print(text, end="")
            raise ConfigError(f"output = {config.output!r}: must be a place to write to ({error})") from error
    print(text, end="")
