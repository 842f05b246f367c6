"""Which runs an ablation has, what each is known by, and what is checked before the first.

A run is known by the fields that make a difference to it, so that tables share cells, and a second call of the same
command finds what is finished.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fasttricks.ablation.cells import AblateConfig, training_of
from fasttricks.ablation.paper import Cell, Table
from fasttricks.config import TIMM, ConfigError, DistillConfig, TrainConfig, UserError
from fasttricks.config.recipes import RECIPES
from fasttricks.data import find_dataset
from fasttricks.learning.precision import resolve_precision
from fasttricks.learning.teacher import load_teacher
from fasttricks.models import build_model
from fasttricks.runs.folder import config_digest, differences, read_config
from fasttricks.system.distributed import World, resolve_device
from fasttricks.training.build import check_batch, num_classes
from fasttricks.training.saving import KEPT_CHECKPOINTS

RESULT = "result.json"
"""What a finished run holds besides the trainer's own files; a run without it is not finished."""
LOG_BYTES = 1 << 20
"""What is reckoned for the log, curves and events of a run; they were 0.1 to 0.3 MB here."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell of a table with its training, or the reason why there is none."""

    cell: Cell
    config: TrainConfig | None
    """Resolved, with the number of classes still as the recipe has it, without seed and run_dir."""
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """One run: a cell and a seed."""

    config: TrainConfig
    ranks: int
    label: str

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def log(self) -> Path:
        """What the trainer says, beside the run's folder."""
        return self.folder.with_suffix(".log")

    def result(self) -> dict[str, Any] | None:
        """What the finished run left, None where it is not finished.

        Raises ConfigError where the folder holds a run of another config: a default has changed since.
        """
        file = self.folder / RESULT
        if not file.is_file():
            return None
        changed = differences(read_config(self.folder), self.config)
        if changed:
            rule = f"was run with other fields ({'; '.join(changed)}); remove it, or give another --run-dir"
            raise ConfigError(f"run_dir = {str(self.folder)!r}: {rule}")
        result: dict[str, Any] = json.loads(file.read_text())
        return result


def plan_cells(table: Table, config: AblateConfig, classes: tuple[str, ...]) -> list[PlannedCell]:
    """The cells of `table` with their trainings on images of `classes`. One that is not to be run says why: it stays blank.

    Raises ConfigError where a trick does not fit the model or the teacher the classes, CheckpointError for a damaged teacher.
    """
    device = resolve_device(config.device, 0)
    planned: list[PlannedCell] = []
    seen: dict[tuple[str, str], str] = {}
    for cell in table.cells:
        resolved = training_of(cell, config)
        if reason := _lacks(cell, resolved, config):
            planned.append(PlannedCell(cell, None, reason))
            continue
        resolved = with_digest(resolved, classes)
        key = training_name(resolved, config.ranks, device)
        if (cell.column, key) in seen:
            same = f"the same run as '{seen[cell.column, key]}': on this device the trick changes nothing"
            low = " (precision auto is fp32 on the CPU; --precision fp16 forces it)" if device.type == "cpu" else ""
            planned.append(PlannedCell(cell, None, same + (low if "low_precision" in cell.tricks else "")))
            continue
        seen[cell.column, key] = cell.row
        planned.append(PlannedCell(cell, resolved))
    return planned


def _lacks(cell: Cell, resolved: TrainConfig, config: AblateConfig) -> str:
    """What a cell waits for before it can be trained; empty for nothing."""
    if cell.network and not config.other_networks:
        return f"{cell.network} only with --other-networks"
    teacher = resolved.distill.teacher
    if not teacher or teacher.startswith(TIMM) or Path(teacher).exists():
        return ""
    known = Path(teacher).name in RECIPES
    way_out = f"train it first: python -m fasttricks.train {Path(teacher).name}" if known else "give another"
    return f"distill.teacher = {teacher!r}: is not there; {way_out}"


def with_digest(config: TrainConfig, classes: tuple[str, ...]) -> TrainConfig:
    """`config` with the digest of its teacher's weights, which tell one distillation from another; as it is without.

    Raises ConfigError or CheckpointError as load_teacher.
    """
    if not config.distill.teacher:
        return config
    digest = _digest(config.distill, classes, config.data.image_size)
    return dataclasses.replace(config, distill=dataclasses.replace(config.distill, digest=digest))


@cache
def _digest(config: DistillConfig, classes: tuple[str, ...], image_size: int) -> str:
    return load_teacher(config, classes, image_size, World(0, 1, 0, 1, torch.device("cpu"))).digest


def training_name(config: TrainConfig, ranks: int, device: torch.device) -> str:
    """A name made of what makes a difference to the result, the seed aside: equal for equal trainings."""
    precision = resolve_precision(config.precision, device)
    return config_digest(dataclasses.replace(config, seed=0, precision=precision), ranks=ranks)


def make_job(planned: PlannedCell, config: AblateConfig, table: Table, seed: int) -> Job:
    """The run of `planned` with the seed number `seed`, counted from 0."""
    assert planned.config is not None
    device = resolve_device(config.device, 0)
    name = training_name(planned.config, config.ranks, device)
    run = dataclasses.replace(
        planned.config,
        precision=resolve_precision(planned.config.precision, device),
        seed=config.seed + seed,
        run_dir=str(Path(config.run_dir) / "runs" / name / f"seed-{config.seed + seed}"),
    )
    cell = planned.cell
    return Job(run, config.ranks, f"{table.name} | {cell.column} | {cell.row} | seed {run.seed}")


def results_of(planned: PlannedCell, config: AblateConfig, table: Table) -> dict[int, dict[str, Any]]:
    """Seed -> result of the finished runs of `planned`."""
    if planned.config is None:
        return {}
    jobs = [make_job(planned, config, table, seed) for seed in range(max(config.seeds, config.more_seeds))]
    return {job.config.seed: result for job in jobs if (result := job.result()) is not None}


# ----------------------------------------------------------------------------------------------- before the first run
def check_data(config: AblateConfig) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the data set is, and its classes, after every check of it. Raises ConfigError or DataError.

    The folder of an ablation is for one data set: another number of classes or images in it is an error.
    """
    train, val = find_dataset(config.data.root)
    num_classes(config.model, train)
    check_batch(config, len(train))
    found = {
        "root": str(Path(train.root).parent),
        "classes": len(train.classes),
        "train_images": len(train),
        "val_images": len(val),
    }
    file = Path(config.run_dir) / "data.json"
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [f"{n}: {before[n]} -> {found[n]}" for n in found if n != "root" and before.get(n) != found[n]]
        if changed:
            rule = f"must be the data set that {config.run_dir} was begun with ({'; '.join(changed)})"
            raise ConfigError(f"data.root = {config.data.root!r}: {rule}; give another --run-dir")
    return found, train.classes


def checkpoint_bytes(config: TrainConfig, classes: int) -> int:
    """Bytes of one checkpoint: FP32 weights and momentum, and the averaged weights where they are kept."""
    with torch.device("meta"):
        model = build_model(config.model, classes)
    state: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return state * (3 if config.ema_decay else 2)


def check_disk(jobs: Sequence[Job], config: AblateConfig, classes: int) -> None:
    """Raise UserError where the disk has too little room for what is still to run."""
    if not jobs:
        return
    sizes = {job.config.model: checkpoint_bytes(job.config, classes) for job in jobs}
    one = max(sizes.values())
    # a run being trained has those that are kept and the one being written
    needed = one * (KEPT_CHECKPOINTS + 1) + len(jobs) * LOG_BYTES
    if config.keep_checkpoints:
        needed += KEPT_CHECKPOINTS * sum(sizes[job.config.model] for job in jobs)
    folder = Path(config.run_dir).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if free < needed:
        need = f"{len(jobs)} runs need about {needed / 1e6:,.0f} MB there (a checkpoint is {one / 1e6:,.1f} MB)"
        way_out = "leave out --keep-checkpoints, free some" if config.keep_checkpoints else "free some"
        rule = f"{need}, but {free / 1e6:,.0f} MB are free; {way_out}, or give another --run-dir"
        raise UserError(f"run_dir = {config.run_dir!r}: {rule}")


@contextmanager
def claimed(job: Job) -> Iterator[bool]:
    """Whether the run is this process's to train, until the end of the block: it is no other's, and none has finished it.

    Held by a lock on the run's log, which the system lets go when the process that holds it ends, however it ends.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield job.result() is None
