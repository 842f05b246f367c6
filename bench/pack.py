"""Costs and gains of packing, for short sides and qualities: bytes, images a second, pixel error.

python -m bench.pack --root DIR/train

For each pack: training's input rate, alternating with torchvision's and ours from the folder; and the validation image, 256
pixels and the centre 224, against the folder's, as PSNR on the 8-bit scale. The effect of packing on accuracy is not measured
on these images; `--checkpoint` evaluates a model that is at hand on re-encoded validation images.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import loader
from bench.cost import measure, repeats
from fasttricks.config import DataConfig, Range, check_fields
from fasttricks.config.cli import parse
from fasttricks.data.packing.pack import PackConfig, pack_split
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import Source
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.listed import ListedImages
from fasttricks.system.command import run_main


@dataclass(frozen=True, kw_only=True)
class Config:
    """The packs to make, and how."""

    root: str
    """Folder of a folder of images a class, such as DIR/train."""
    short_sides: tuple[int, ...] = (0, 512, 384, 320, 256)
    """Pixels; 0: as they are."""
    qualities: tuple[int, ...] = (75, 85, 90, 95)
    """JPEG qualities of each short side."""
    rounds: Annotated[int, Range(1, zero="bytes and pixel error alone")] = 3
    """Turns of each loader; medians are over these."""
    checkpoint: str = ""
    """Instead of all this: evaluate this run on val/ of its data as re-encoded at each quality."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(args: list[str]) -> None:
    """Measure and print the table."""
    config = parse(Config(root=""), args, prog="python -m bench.pack", description=__doc__ or "")
    console, workers = Console(), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="pack-") as place:
        if config.checkpoint:
            evaluate(console, config, Path(place))
            return
        folder = scan_folder(config.root)
        packs = make_packs(folder, config, Path(place))
        heads = "MB", "PSNR dB", "worst 1 %", "CPU ms an image", "x torchvision", "imgs/sec", "x torchvision"
        table = Table("", *heads, title=str(folder.root))
        rates = measure_rates({"folder": folder, **packs}, workers, config.rounds) if config.rounds else {}
        exact = validation_pixels(folder)
        for name, images in {"folder": folder, **packs}.items():
            size = sum(len(images.read(i)) for i in range(len(images))) / 1e6
            psnr = np.percentile(psnr_of(validation_pixels(images), exact), [50, 1], method="lower")
            shown = ["exact" if np.isinf(error) else f"{error:.1f}" for error in psnr]
            table.add_row(name, f"{size:.1f}", *shown, *rates.get(name, ()))
        console.print(table)


def measure_rates(sources: dict[str, ListedImages], workers: int, rounds: int) -> dict[str, tuple[str, ...]]:
    """For each source: CPU time and images a second, each with how much better than torchvision's from the folder."""
    folder = next(iter(sources.values()))
    times = repeats(len(folder))
    loaders: dict[str, Any] = {"torchvision": loader.torchvision(folder.root, workers, times)}
    loaders |= {name: loader.fasttricks(repeat(images, times), workers) for name, images in sources.items()}
    return {
        name: (f"{cost.cpu_ms:.2f}", f"{cost.cpu_ratio:.1f}", f"{cost.rate:,.0f}", f"{cost.rate_ratio:.1f}")
        for name, cost in measure(loaders, rounds).items()
    }


def make_packs(folder: Any, config: Config, place: Path) -> dict[str, ListedImages]:
    """A pack of each short side and quality, by a name that says which."""
    packs: dict[str, ListedImages] = {}
    for side in config.short_sides:
        for quality in config.qualities:
            name = f"{side or 'same size'}, quality {quality}"
            packs[name] = pack_split(folder, place / name, PackConfig(short_side=side, quality=quality)).images
    return packs


def repeat(images: ListedImages, times: int) -> ListedImages:
    """The same images so many times over."""
    more: dict[str, Any] = {"files": images.files * times, "labels": images.labels * times}
    if hasattr(images, "index"):
        more["index"] = {name: np.tile(column, times) for name, column in images.index.items()}
    return dataclasses.replace(images, **more)


def validation_pixels(images: Source) -> np.ndarray:
    """(N, 224, 224, 3), 0 to 255: the inputs of validation."""
    batches = Loader(images, DataConfig(), training=False, batch_size=64, device=torch.device("cpu"))
    pixels = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).double().numpy()
    return np.round(pixels * [58.393, 57.12, 57.375] + [123.68, 116.779, 103.939])


def psnr_of(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, dB; infinite where two are equal."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / ((got - want) ** 2).mean((1, 2, 3)))


def evaluate(console: Console, config: Config, place: Path) -> None:
    """Print the top-1 of a checkpoint on its validation images, as they are and re-encoded."""
    from fasttricks.commands.evaluate import EvaluateConfig, evaluate_checkpoint
    from fasttricks.runs.saved import read_saved
    from fasttricks.system.distributed import World

    saved = read_saved(Path(config.checkpoint))
    folder = scan_folder(Path(config.root) / "val", classes=saved.classes)
    table = Table("quality", "MB", "top-1 %", title=f"{saved.path} on {folder.root}, {len(folder):,} images")
    for quality in (0, *config.qualities):
        out = place / str(quality)
        report = pack_split(folder, out / "val", PackConfig(quality=quality))
        data = dataclasses.replace(saved.config.data, root=str(out))
        world = World.alone(torch.device("cpu"))
        metrics = evaluate_checkpoint(EvaluateConfig(data=data, eval=saved.config.eval), saved, world)
        table.add_row(str(quality or "as they are"), f"{report.bytes / 1e6:.1f}", f"{metrics['top1']:.2f}")
    console.print(table)


if __name__ == "__main__":
    run_main(main)
