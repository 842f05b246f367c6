"""make bench: loader and step beside what a user would pick instead, as a table on the terminal and as JSON."""

from __future__ import annotations

import dataclasses
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import loader, step
from bench.pairs import Row, by_turns
from fasttricks.cli import parse, run_main
from fasttricks.data import find_root, scan_folder
from fasttricks.distributed import World, resolve_device
from fasttricks.runfolder import versions, write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure, and on what."""

    root: str = "demo"
    """Folder with train/CLASS/IMAGE; the word demo: images that the project draws itself."""
    images: int = 512
    """Images of root that a pass of a loader takes."""
    rounds: int = 5
    """Measured turns of each contestant; medians are over these."""
    batch_size: int = 12
    """Images a step."""
    output: str = ""
    """JSON file to write; empty: bench/results/DEVICE.json."""


def main(args: list[str]) -> None:
    """Measure, print the tables, write the JSON."""
    config = parse(BenchConfig(), args, prog="python -m bench.report", description=__doc__ or "")
    device = resolve_device("auto", 0)
    workers = len(os.sched_getaffinity(0))
    name = World(0, 1, 0, 1, device).device_name
    console = Console()
    console.print(
        f"{name}; {config.rounds} rounds by turns; ratio: fasttricks / contestant, median (lowest to highest)"
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = link_images(find_root(config.root) / "train", Path(folder), config.images)
        rows = {"loader": by_turns(loader.contestants(root, workers), config.rounds)}
    show(console, f"Loader, {loader.IMAGE_SIZE} pixels, {workers} workers, {config.images} images", rows["loader"])
    with step.contestants(device, config.batch_size) as steps:
        roof = {"a matrix product's FLOP/s": step.matrix_product(device)}
        rows["step"] = by_turns(steps | roof, config.rounds)
    show(console, f"Training step, {step.IMAGE_SIZE} pixels, batch {config.batch_size}", rows["step"])
    output = Path(config.output) if config.output else RESULTS / f"{platform.machine()}-{device.type}.json"
    results = {table: [dataclasses.asdict(row) for row in part] for table, part in rows.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        output, {"device": name, "versions": versions(), "config": dataclasses.asdict(config), "imgs_per_sec": results}
    )
    console.print(f"{time.perf_counter() - start:.0f} s; written to {output}")


def link_images(source: Path, target: Path, count: int) -> Path:
    """A folder of class folders of links to `count` images of `source`, evenly spread over it (all where it has fewer)."""
    folder = scan_folder(source)
    chosen = sorted({len(folder) * i // count for i in range(count)}) if count < len(folder) else range(len(folder))
    for index in chosen:
        link = target / folder.files[index]
        link.parent.mkdir(exist_ok=True)
        link.symlink_to((source / folder.files[index]).resolve())
    return target


def show(console: Console, title: str, rows: list[Row]) -> None:
    """Print one table."""
    table = Table("", "imgs/sec", "ratio", title=title, title_justify="left")
    for row in rows:
        rate = f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.2f}"
        table.add_row(row.name, rate, f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})")
    console.print(table)


if __name__ == "__main__":
    run_main(main)
