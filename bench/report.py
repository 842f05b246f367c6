"""make bench: imgs/sec beside the usual alternatives, alternating in one call: a table, a JSON file and a chart.

Parts: loader (alone), step (alone, on images that lie on the device), end_to_end (both, as a run does it), kernels (the losses)
and transfer (a step of segmentation and of detection). On the CPU small sizes; on a GPU the paper's. Where it would take longer
than --budget-s, it takes fewer rounds.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from bench import end_to_end, loader, losses, published, step, transfer_step
from bench.budget import CPU_S, Budget
from bench.chart import draw
from bench.images import link_images, shrink_images
from bench.pairs import BUSY, LEAST, Row, by_turns, show_ratio
from bench.step import StepCase
from fasttricks.config import DataConfig, Precision, Range, check_fields, model_info, replace_at, require
from fasttricks.config.cli import parse
from fasttricks.config.recipes import cifar10, resnet50d_tricks
from fasttricks.data.sources import open_split
from fasttricks.data.sources.folder import scan_folder
from fasttricks.runs.folder import versions, write_json
from fasttricks.system.command import run_main
from fasttricks.system.distributed import World, resolve_device
from fasttricks.system.files import check_writable
from fasttricks.system.monitor import start_monitor

RESULTS, OUT = Path(__file__).parent / "results", Path(__file__).parent / "out"
Notes = Callable[[list[Row]], list[str]]
Part = Literal["loader", "step", "end_to_end", "kernels", "transfer"]
PARTS: tuple[Part, ...] = ("loader", "step", "end_to_end", "kernels", "transfer")
PAPER_SHARES: dict[Precision, int] = {"fp32": 32, "fp16": 128}
"""Images that each of the paper's 8 GPUs takes a step, by precision."""


@dataclass(frozen=True, kw_only=True)
class BenchData:
    """The images of loader and end_to_end."""

    root: str = "demo"
    """Folder with train/CLASS/IMAGE; the word demo: JPEGs that the project draws itself."""
    images: Annotated[int, Range(300, note="the first 256 do not count")] = 512
    """Images of root that a pass of a loader takes (as many as there are, where there are fewer)."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The measurements, and their data."""

    data: BenchData = field(default_factory=BenchData)
    parts: tuple[Part, ...] = PARTS
    """Which parts to measure."""
    rounds: Annotated[int, Range(LEAST, note="a median of fewer says little")] = 5
    """Rounds of each table that count, at most; medians are over these."""
    budget_s: Annotated[float, Range(0, zero="choose")] = 0.0
    """Seconds after which rounds are left out, though 3 of each table are always taken; 0: 540 on the CPU, no limit on a GPU."""
    batch_size: Annotated[int, Range(1, zero="choose")] = 0
    """Images of a step; 0: 16 on the CPU, the paper's 256 (fp32) and 1024 (fp16) on a GPU."""
    models: tuple[str, ...] = ()
    """Networks of the step; empty: resnet50d on the CPU, the paper's four on a GPU."""
    compiled: bool = False
    """Measure torch.compile too, of ours and of the peers: adds minutes. On a GPU it always is."""
    output: str = ""
    """JSON file to write, with a chart beside it; empty: bench/out/DEVICE.json."""
    save: bool = False
    """Write to bench/results/, which is committed."""

    def __post_init__(self) -> None:
        check_fields(self)
        ok = not self.output or self.output.endswith(".json")
        require(ok, "output", self.output, "must end in .json; the chart beside it ends in .png")
        require(
            not (self.save and self.output), "output", self.output, "is another place than --save has; leave one out"
        )
        wrong = [name for name in self.models if name not in step.PAPER_NETWORKS]
        require(not wrong, "models", wrong, f"must be of {', '.join(step.PAPER_NETWORKS)}, which timm has too")


@dataclass(frozen=True)
class Measured:
    """A table of results."""

    title: str
    unit: str
    rows: list[Row]
    notes: list[str]
    case: StepCase | None = None
    """The network, size and batch of a step."""


@dataclass(frozen=True)
class Bench:
    """A call of the benchmark: its measurements, its device and its output."""

    config: BenchConfig
    device: torch.device
    folder: Path
    """Holds resources for as long as the call."""
    console: Console
    budget: Budget

    @property
    def cores(self) -> int:
        """CPUs that this process may use."""
        return len(os.sched_getaffinity(0))

    def turns(
        self, title: str, unit: str, contestants: dict[str, Callable[[], float]], notes: Notes, until_s: float
    ) -> Measured:
        """Measure `contestants` in alternation, and show the table. notes: of the rows."""
        rows = by_turns(contestants, self.config.rounds, until_s=until_s)
        taken = len(rows[0].rates)
        fewer = [f"{taken} rounds of {self.config.rounds}: the time budget"] if taken < self.config.rounds else []
        table = Measured(title, unit, rows, notes(rows) + fewer)
        show(self.console, table)
        return table

    def images(self) -> Path:
        """The training images to measure on: links to config.data.images of them."""
        target = self.folder / "images"
        if not target.exists():
            link_images(
                open_split(DataConfig(root=self.config.data.root), "train").root,
                target / "train",
                self.config.data.images,
            )
            (target / "val").symlink_to(target / "train")
        return target


def step_cases(config: BenchConfig, device: torch.device, gpus: int) -> list[StepCase]:
    """The networks and batches of the step: small on the CPU; on a GPU the paper's networks and batches, on one and on all GPUs.

    The paper's batches of 256 (fp32) and 1024 (fp16) are those of 8 GPUs: fewer get their share of it.
    """
    if device.type == "cpu":
        models, size = config.models or ("resnet50d",), config.batch_size or 16
        return [StepCase(model=model, batch_size=size, compiled=config.compiled) for model in models]
    return [
        StepCase(
            model=model,
            precision=precision,
            batch_size=config.batch_size or share * ranks,
            image_size=model_info(model).image_size,
            device="cuda",
            ranks=ranks,
            compiled=True,
        )
        for model in config.models or step.PAPER_NETWORKS
        for precision, share in PAPER_SHARES.items()
        for ranks in sorted({1, gpus})
    ]


def measure_loader(bench: Bench) -> Iterator[Measured]:
    """The input pipeline on the CPU beside torchvision's and timm's; on a GPU that of the GPU too, alone."""
    workers = bench.cores
    title = f"Loader, {loader.IMAGE_SIZE} pixels, {workers} workers, {bench.config.data.images} images"
    notes = [f"the first {loader.SKIPPED} batches of a pass are not counted: they may have been prepared ahead"]
    contestants = loader.contestants(bench.images() / "train", workers)
    on_gpu = bench.device.type == "cuda"
    tables = 1 + on_gpu
    yield bench.turns(title, "imgs/sec", contestants, lambda _: notes, bench.budget.until_s("loader", 0, tables))
    if on_gpu:
        title = (
            f"Loader on the GPU, {loader.IMAGE_SIZE} pixels, fp16: host threads, share of a batch for the JPEG engine"
        )
        contestants = loader.on_device(scan_folder(bench.images() / "train"), bench.device)
        yield bench.turns(title, "imgs/sec", contestants, lambda _: notes, bench.budget.until_s("loader", 1, tables))


def measure_step(bench: Bench) -> Iterator[Measured]:
    """The training step beside timm's, and beside a matrix product."""
    cases = step_cases(bench.config, bench.device, torch.cuda.device_count())
    for number, case in enumerate(cases):
        until_s = bench.budget.until_s("step", number, len(cases))
        notes = [] if case.compiled else ["skipped: torch.compile of ours and timm's (--compiled measures them)"]
        try:
            with step.contestants(case) as steps:
                on_cpu = case.device == "cpu"
                roof = {"a matrix product's FLOP/s": step.matrix_product(case)} if on_cpu else {}
                table = bench.turns(case.title, "imgs/sec", steps | roof, lambda _, notes=notes: notes, until_s)
                yield dataclasses.replace(table, case=case)
        except step.ContestantError as error:
            bench.console.print(f"skipped: {case.title}: {error}")


def measure_end_to_end(bench: Bench) -> Iterator[Measured]:
    """Loader and step together, beside each alone: for the recipe cifar10, and for resnet50d-tricks at 224 pixels."""
    small = bench.folder / "small"
    shrink_images(bench.images() / "train", small / "train", bench.config.data.images, 32)
    (small / "val").symlink_to(small / "train")
    cpu = bench.device.type == "cpu"
    large = dataclasses.replace(resnet50d_tricks(), global_batch_size=16 if cpu else 128)
    works = ((cifar10(), small, 1536), (large, bench.images(), 48 if cpu else 4096))
    for number, (recipe, root, images) in enumerate(works):
        config = replace_at(recipe, "data.root", str(root))
        world = World.alone(bench.device)
        folder = bench.folder / config.recipe
        parts = end_to_end.contestants(config, world, folder, images)
        title = f"End to end, recipe {config.recipe}, {config.data.image_size} pixels, batch {config.global_batch_size}"
        until_s = bench.budget.until_s("end_to_end", number, len(works))
        yield bench.turns(
            title, "imgs/sec", parts, lambda rows: [end_to_end.bounds(rows, bench.cores, shared=cpu)], until_s
        )


def measure_kernels(bench: Bench) -> Iterator[Measured]:
    """The losses beside torch's and Liger's."""
    compiled = bench.config.compiled or bench.device.type == "cuda"
    sizes = ((256, False), (1024, False), (1024, True))
    for number, (rows, mixup) in enumerate(sizes):
        contestants, skipped = losses.contestants(rows, 1000, bench.device, mixup=mixup, compiled=compiled)
        kind = "mixup's labels, for torch dense" if mixup else "labels"
        title = f"Cross-entropy, forward and backward, {rows} x 1000, smoothing, {kind}"
        notes = [f"skipped: {', '.join(skipped)}"] if skipped else []
        until_s = bench.budget.until_s("kernels", number, len(sizes))
        yield bench.turns(title, "passes/sec", contestants, lambda _, notes=notes: notes, until_s)


def measure_transfer(bench: Bench) -> Iterator[Measured]:
    """A training step of section 6's networks beside torchvision's."""
    cases = transfer_step.cases(bench.device)
    for number, case in enumerate(cases):
        until_s = bench.budget.until_s("transfer", number, len(cases))
        try:
            with transfer_step.contestants(case) as steps:
                yield bench.turns(case.title, "imgs/sec", steps, lambda _: [], until_s)
        except step.ContestantError as error:
            bench.console.print(f"skipped: {case.title}: {error}")


MEASURES = {
    "loader": measure_loader,
    "step": measure_step,
    "end_to_end": measure_end_to_end,
    "kernels": measure_kernels,
    "transfer": measure_transfer,
}


def main(args: list[str]) -> None:
    """Measure, print the tables, write JSON and chart."""
    config = parse(BenchConfig(), args, prog="python -m bench.report", description=__doc__ or "")
    device = resolve_device("auto", 0)
    name = World.alone(device).device_name
    file_name = f"{platform.machine()}-{device.type}.json"
    output = Path(config.output) if config.output else (RESULTS if config.save else OUT) / file_name
    check_writable(output.parent)
    console, start, monitor = Console(), time.perf_counter(), start_monitor(device)
    budget = Budget(config.budget_s or (CPU_S if device.type == "cpu" else math.inf), config.parts)
    console.print(f"{name}; {LEAST} to {config.rounds} rounds in alternation after one of warm-up; {budget}")
    console.print("ratio: fasttricks / contestant of the same round, median (lowest to highest)")
    tables: dict[str, list[Measured]] = {}
    readings: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, device, Path(folder), console, budget)
        for part in config.parts:
            tables[part] = list(MEASURES[part](bench))
            readings[part] = monitor.take()
    monitor.close()
    if device.type == "cuda":
        steps = [(table.case, table.rows[0].rate) for table in tables.get("step", []) if table.case]
        rates = {(case.model, f"{case.ranks} x {name}", case.precision): rate for case, rate in steps}
        console.print(published.rates_table(rates))
        console.print(published.reached_table())
    result = {
        "device": name,
        "versions": versions(),
        "config": recorded(config),
        "seconds": round(time.perf_counter() - start),
        "gpu": {"note": monitor.note, **readings},
        "tables": {part: [dataclasses.asdict(table) for table in found] for part, found in tables.items()},
    }
    write_json(output, result)
    draw(result, output.with_suffix(".png"))
    console.print(f"{time.perf_counter() - start:.0f} s; written to {output} and {output.with_suffix('.png')}")


def recorded(config: BenchConfig) -> dict[str, Any]:
    """`config` as results keep it: for others to read, so the images by their folder's name, and not where this file lies."""
    fields = dataclasses.asdict(config)
    del fields["output"], fields["save"]
    fields["data"]["root"] = Path(config.data.root).name
    return fields


def show(console: Console, table: Measured) -> None:
    """Print one table, with its notes below."""
    out = Table("", table.unit, "ratio", title=table.title, title_justify="left")
    for row in table.rows:
        rate = f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.2f}"
        out.add_row(
            row.name, rate, "{} ({} to {})".format(*map(show_ratio, (row.ratio, row.ratio_low, row.ratio_high)))
        )
    console.print(out)
    disturbed = max(row.others for row in table.rows)
    busy = [f"other work took up to {disturbed:.0%} of the CPUs in a turn"] if disturbed > BUSY else []
    for note in table.notes + busy:
        console.print(f"  {note}", highlight=False)


if __name__ == "__main__":
    run_main(main)
