"""The checks before the first run of an ablation: the data set, the runs' configs, and the disk's room."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import Job
from fasttricks.config import ConfigError, TrainConfig, UserError, require
from fasttricks.data.sources import common_root
from fasttricks.learning.compiled import check_compile
from fasttricks.learning.step_graph import check_graph
from fasttricks.system.distributed import resolve_device
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import anything, table
from fasttricks.tasks import find_task
from fasttricks.training.checks import check_batch, num_classes
from fasttricks.training.run import KEPT_CHECKPOINTS

_FILES = Reader(ConfigError, "must be as fasttricks.ablate wrote it", "give another --run-dir")
LOG_BYTES = 1 << 20
"""The allowance for the log, curves and events of a run; they were 0.1 to 0.3 MB here."""


def check_data(config: AblateConfig) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The facts about the data set, and its classes, after every check of it. Raises ConfigError or DataError.

    The folder of an ablation is for one data set: another number of classes or images in it is an error.
    """
    task = find_task(config.task)
    train, val = task.open_data(config.data)
    num_classes(config, train)
    check_batch(config, len(train))
    found = {
        "root": str(common_root(train, val)),
        "classes": len(train.classes),
        "train_images": len(train),
        "val_images": len(val),
    }
    if config.split != "val":
        found[f"{config.split}_images"] = len(task.open_split(config.data, config.split, train.classes))
    file = Path(config.run_dir) / "data.json"
    if is_there(file):
        before = _FILES.json(file, table(anything))
        before = {name: value for name, value in found.items() if name in ("root", "test_images")} | before
        changed = [f"{n}: {before.get(n)} -> {found[n]}" for n in found if n != "root" and before.get(n) != found[n]]
        if changed:
            rule = f"must be the data set that {config.run_dir} was started with ({'; '.join(changed)})"
            raise ConfigError(f"data.root = {config.data.root!r}: {rule}; give another --run-dir")
    return found, train.classes


def check_runs(jobs: Sequence[Job]) -> None:
    """Raise ConfigError where a run's ranks do not divide its batch, as check_compile and check_graph, and for early stopping."""
    rule = "would give the cells of a table runs of unlike length; leave it at 0"
    for job in jobs:
        require(job.config.eval.patience == 0, "eval.patience", job.config.eval.patience, rule)
        job.config.micro_batch_size(job.ranks)
        check_compile(job.config.compile, ranks=job.ranks, accumulate=job.config.accumulate)
        alike = find_task(job.config.task).facts.steps_alike
        check_graph(job.config, resolve_device(job.config.device, 0).type, ranks=job.ranks, steps_alike=alike)


def checkpoint_bytes(config: TrainConfig, classes: int) -> int:
    """Bytes of one checkpoint: FP32 weights and momentum, and the averaged weights where they are kept."""
    with torch.device("meta"):
        model = find_task(config.task).make_model(config, classes)
    state: int = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return state * (3 if config.ema_decay else 2)


def check_disk(jobs: Sequence[Job], config: AblateConfig, classes: int) -> None:
    """Raise UserError where the disk has too little room for the runs that remain."""
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
