"""A job: one run of an ablation, in a folder that is named by its training, and which process may train it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttricks.config import ConfigError, TrainConfig
from fasttricks.runs.folder import differences, read_config
from fasttricks.runs.metric import Metric
from fasttricks.system.ownership import Claim, InUseError
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import Kind, anything, fields, number, table, text, whole
from fasttricks.tasks import find_task

RESULT = "result.json"
"""The file of a finished run besides the trainer's own; a run without it is not finished."""


def metrics_of(config: TrainConfig, classes: int = 2) -> tuple[Metric, ...]:
    """The metrics of the ablation's task. The first is the headline, by which cells are compared, of any number of classes."""
    return find_task(config.task).metrics_of(classes)


def resolution(config: TrainConfig, data: Mapping[str, Any]) -> float:
    """The smallest step of the headline, in points: the share of one validation image in a top-1; 0: it is continuous.

    data: as preflight.check_data gives it.
    """
    return 100 / int(data["val_images"]) if config.task == "classification" else 0.0


_RESULTS = Reader(ConfigError, "must be as an ablation's run wrote it", "remove its folder, and the run is done again")


def _result_kind(metrics: Sequence[Metric]) -> Kind:
    numbers = dict.fromkeys(("val_loss", "train_seconds", *(metric.name for metric in metrics)), number())
    return fields(
        {"cpu_seconds": number(), "versions": fields({"commit": text()})},
        {"ranks": whole(1), "diverged": text(10_000), "device": text(), "validation": table(anything), **numbers},
    )


@dataclass(frozen=True)
class Job:
    """One run: a cell's training with one seed."""

    config: TrainConfig
    ranks: int
    label: str
    metrics: tuple[Metric, ...] = ()
    """The metrics that its result may have, the headline first; others in it are left alone. Empty: the headline alone."""
    split: str = "val"
    """As AblateConfig.split."""

    def __post_init__(self) -> None:
        if not self.metrics:
            object.__setattr__(self, "metrics", metrics_of(self.config)[:1])

    @property
    def headline(self) -> Metric:
        """The metric by which cells are compared."""
        return self.metrics[0]

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def log(self) -> Path:
        """The trainer's output, beside the run's folder."""
        return self.folder.with_suffix(".log")

    def result(self) -> dict[str, Any] | None:
        """The result of the finished run, None where it is not finished.

        Raises ConfigError where the folder holds a run of another config: a default has changed since.
        """
        file = self.folder / RESULT
        if not is_there(file):
            return None
        changed = differences(read_config(self.folder), self.config)
        if changed:
            rule = f"was run with other fields ({'; '.join(changed)}); remove it, or give another --run-dir"
            raise ConfigError(f"run_dir = {str(self.folder)!r}: {rule}")
        result: dict[str, Any] = _RESULTS.json(file, _result_kind(self.metrics))
        return result


@contextmanager
def claimed(job: Job) -> Iterator[bool]:
    """Whether the run is this process's to train, until the end of the block: it is no other's, and none has finished it.

    Held beside the run's folder, whose own owner is the process that trains.
    """
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        claim = Claim(job.folder.with_suffix(".lock"), patience_s=0)
    except InUseError:
        yield False
        return
    with claim:
        yield job.result() is None
