"""A cell and its runs, from the plan to the report: the training that it stands for, a job a seed, and their results.

A training is named by the fields that make a difference to it, so that tables share runs, and a second call of the same
command finds the finished runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fasttricks.ablation.cells import AblateConfig, training_of
from fasttricks.ablation.jobs import Job, metrics_of
from fasttricks.ablation.paper import Cell, Table
from fasttricks.ablation.transfer import digest, lacks, of_seed
from fasttricks.config import TIMM, DataConfig, DistillConfig, DoesNotApplyError, TrainConfig
from fasttricks.config.recipes import RECIPES
from fasttricks.learning.precision import resolve_precision
from fasttricks.learning.teacher import load_teacher
from fasttricks.runs.folder import config_digest
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World, resolve_device


@dataclass(frozen=True)
class CellRuns:
    """A cell, its jobs or the reason why it has none, and their results."""

    cell: Cell
    jobs: tuple[Job, ...] = ()
    """One a seed, in order; empty where the cell stays blank."""
    reason: str = ""
    """Why there are no jobs."""
    results: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    """Seed -> result, of the jobs that are finished."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Seed -> error in this call."""

    @property
    def config(self) -> TrainConfig | None:
        """The training with its first seed; None where the cell stays blank."""
        return self.jobs[0].config if self.jobs else None

    @property
    def diverged(self) -> int:
        """Runs that diverged."""
        return sum("diverged" in result for result in self.results.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """Why runs of the cell are missing."""
        failed = tuple(f"seed {seed} failed: {wrong}" for seed, wrong in self.failures.items())
        return (*failed, self.reason) if self.reason else failed

    def scores(self, metric: Metric | None = None) -> dict[int, float]:
        """Seed -> the run's score, without the runs that diverged. metric: None: the headline."""
        name = metric.name if metric else self.jobs[0].headline.name if self.jobs else ""
        return {seed: result[name] for seed, result in self.results.items() if name in result}

    def read(self, failures: Mapping[str, str] | None = None) -> CellRuns:
        """The same with the results of its jobs by now; failures: run folder -> error, of all jobs.

        Raises ConfigError as Job.result.
        """
        results = {job.config.seed: result for job in self.jobs if (result := job.result()) is not None}
        wrong = {job.config.seed: (failures or {}).get(job.config.run_dir, "") for job in self.jobs}
        return dataclasses.replace(self, results=results, failures={seed: w for seed, w in wrong.items() if w})


Plan = Sequence[tuple[Table, Sequence[CellRuns]]]
"""The tables that were asked for, each with its cells in order."""


def by_column(cells: Sequence[CellRuns]) -> dict[str, list[CellRuns]]:
    """Column -> its cells, in the table's order: the first of each is its baseline."""
    columns: dict[str, list[CellRuns]] = {}
    for runs in cells:
        columns.setdefault(runs.cell.column, []).append(runs)
    return columns


def plan_cells(table: Table, config: AblateConfig, classes: tuple[str, ...]) -> list[CellRuns]:
    """The cells of `table` with their jobs on images of `classes`. One that is not to be run says why: it stays blank.

    Raises ConfigError as training_of and where the teacher has other classes, CheckpointError for a damaged teacher.
    """
    device = resolve_device(config.device, 0)
    planned: list[CellRuns] = []
    seen: dict[tuple[str, str], str] = {}
    for cell in table.cells:
        try:
            training = training_of(cell, config)
        except DoesNotApplyError as error:
            planned.append(CellRuns(cell, reason=f"does not apply: {error}"))
            continue
        if reason := _lacks(cell, training, config):
            planned.append(CellRuns(cell, reason=reason))
            continue
        training = _with_digest(training, classes)
        name = training_name(training, config.ranks, device)
        if (cell.column, name) in seen:
            same = f"the same run as '{seen[cell.column, name]}'"
            same += ": on this device the trick changes nothing" if not cell.as_it_is else ""
            low = " (precision auto is fp32 on the CPU; --precision fp16 forces it)" if device.type == "cpu" else ""
            planned.append(CellRuns(cell, reason=same + (low if "low_precision" in cell.tricks else "")))
            continue
        seen[cell.column, name] = cell.row
        label = f"{table.name} | {cell.column} | {cell.row}"
        missing = {seed: why for seed in _seeds(config) if (why := lacks(of_seed(training.init, seed)))}
        jobs = _jobs(training, config, label, metrics_of(config, len(classes)), without=missing)
        planned.append(CellRuns(cell, jobs, "; ".join(dict.fromkeys(missing.values()))))
    return planned


def _seeds(config: AblateConfig) -> range:
    """The seeds that the ablation may come to."""
    return range(config.seed, config.seed + max(config.seeds, config.more_seeds))


def _jobs(
    training: TrainConfig, config: AblateConfig, label: str, metrics: tuple[Metric, ...], *, without: Container[int]
) -> tuple[Job, ...]:
    """A job of `training` for each seed that the ablation may come to, but for those whose base network is not there."""
    device = resolve_device(config.device, 0)
    name = training_name(training, config.ranks, device, **({} if config.split == "val" else {"split": config.split}))
    folder = Path(config.run_dir) / "runs" / name
    training = dataclasses.replace(training, precision=resolve_precision(training.precision, device))
    runs = [_of_seed(training, seed, folder) for seed in _seeds(config) if seed not in without]
    return tuple(Job(run, config.ranks, f"{label} | seed {run.seed}", metrics, config.split) for run in runs)


def _of_seed(training: TrainConfig, seed: int, folder: Path) -> TrainConfig:
    init = of_seed(training.init, seed)
    weights = f"-{known}" if (known := digest(init)) else ""
    return dataclasses.replace(training, seed=seed, init=init, run_dir=str(folder / f"seed-{seed}{weights}"))


def training_name(config: TrainConfig, ranks: int, device: torch.device, **more: object) -> str:
    """A name made of the fields that decide the result, and of `more`, without the seed: equal for equal trainings."""
    precision = resolve_precision(config.precision, device)
    return config_digest(dataclasses.replace(config, seed=0, precision=precision), ranks=ranks, **more)


def _lacks(cell: Cell, training: TrainConfig, config: AblateConfig) -> str:
    """The missing condition for the training of a cell; empty for none."""
    if cell.network and not config.other_networks:
        return f"{cell.network} only with --other-networks"
    teacher = training.distill.teacher
    if not teacher or teacher.startswith(TIMM) or Path(teacher).exists():
        return ""
    known = Path(teacher).name in RECIPES
    way_out = f"train it first: python -m fasttricks.train {Path(teacher).name}" if known else "give another"
    return f"distill.teacher = {teacher!r}: does not exist; {way_out}"


def _with_digest(config: TrainConfig, classes: tuple[str, ...]) -> TrainConfig:
    """`config` with the digest of its teacher's weights, which tell one distillation from another; as it is without.

    Raises ConfigError or CheckpointError as load_teacher.
    """
    if not config.distill.teacher:
        return config
    digest = _digest(config.distill, classes, config.data)
    return dataclasses.replace(config, distill=dataclasses.replace(config.distill, digest=digest))


@cache
def _digest(config: DistillConfig, classes: tuple[str, ...], data: DataConfig) -> str:
    return load_teacher(config, classes, data, World.alone(torch.device("cpu"))).digest
