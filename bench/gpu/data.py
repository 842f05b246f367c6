"""DALI on the card: the loader alone by threads and by the JPEG engine's share, and the loader and the step together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from bench import end_to_end
from bench.gpu.child import attempt
from bench.gpu.clock import device_of
from bench.gpu.parts import Job, Row
from bench.loader import on_device
from bench.pairs import by_turns
from bench.soak import tiny
from fasttricks.config import DataConfig, TrainConfig, replace_at
from fasttricks.config.recipes import cifar10, resnet50d_tricks
from fasttricks.data.sources import open_split
from fasttricks.data.sources.folder import scan_folder
from fasttricks.system.distributed import World


def loader(job: Job) -> Iterator[Row]:
    """imgs/sec of the training input at 224 pixels in FP16, by threads and hw_decoder_load: a pass of each that counts."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"batch_size": 8, "image_size": 32, "images": 48} if job.tiny else {}
        turns = on_device(scan_folder(images(job, Path(folder)) / "train"), device_of(job.device), **sizes)
        for name, turn in list(turns.items())[: 2 if job.tiny else None]:
            yield from attempt({"loader": name}, lambda turn=turn: iter([{"imgs/sec": turn()}]))


def together(job: Job) -> Iterator[Row]:
    """Training as a run does it, beside its loader and its step alone, deterministic on and off."""
    settings: tuple[Literal["on", "off"], ...] = ("on", "off")
    for deterministic in settings:
        yield from attempt({"deterministic": deterministic}, lambda on=deterministic: _together(job, on))


def _together(job: Job, deterministic: Literal["on", "off"]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(job, images(job, Path(folder)), deterministic)
        parts = end_to_end.contestants(
            config, World.alone(device_of(job.device)), Path(folder), 48 if job.tiny else 2560
        )
        yield from table(parts, 1 if job.tiny else 3)


def recipe(job: Job, root: Path, deterministic: Literal["on", "off"]) -> TrainConfig:
    """resnet50d-tricks with the images of one of its eight GPUs; the walk's is of seconds."""
    config = replace(resnet50d_tricks(), global_batch_size=128)
    if job.tiny:
        config = replace(cifar10(), global_batch_size=16)
        config = replace(config, model=replace(config.model, name="resnet8d", width=0.125))
    config = replace(config, deterministic=deterministic, device=job.device)
    return replace_at(config, "data.root", str(root))


def images(job: Job, folder: Path) -> Path:
    """The root of the images: the demo's, or a few for the walk."""
    return tiny.write_images(folder / "data") if job.tiny else open_split(DataConfig(root="demo"), "train").root.parent


def table(turns: dict[str, Callable[[], float]], rounds: int) -> Iterator[Row]:
    """A row for each contestant, in alternation; ratios are of the first. No round is taken again: the time is short."""
    for row in by_turns(turns, rounds, until_s=0.0, least=rounds):
        spread = {"lowest": min(row.rates), "highest": max(row.rates)}
        yield {"contestant": row.name, "imgs/sec": row.rate, "first / this": row.ratio, **spread}
