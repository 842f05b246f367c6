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
from fasttricks.system.schema import Kind, fields, number, text, whole
from fasttricks.tasks.classification import CLASSIFICATION

RESULT = "result.json"
"""The file of a finished run besides the trainer's own; a run without it is not finished."""

TASK = CLASSIFICATION
"""The task that an ablation's runs train."""
HEADLINE, *_ = TASK.metrics_of(2)
"""The metric by which cells are compared: that of any number of classes."""


def one_image(data: Mapping[str, Any]) -> float:
    """The share of one validation image in the headline, in points; data: as preflight.check_data gives it."""
    return 100 / int(data["val_images"])


_RESULTS = Reader(ConfigError, "must be as an ablation's run wrote it", "remove its folder, and the run is done again")


def _result_kind(metrics: Sequence[Metric]) -> Kind:
    numbers = dict.fromkeys(("val_loss", "train_seconds", *(metric.name for metric in metrics)), number())
    return fields(
        {"cpu_seconds": number(), "versions": fields({"commit": text()})},
        {"ranks": whole(1), "diverged": text(10_000), "device": text(), **numbers},
    )


@dataclass(frozen=True)
class Job:
    """One run: a cell's training with one seed."""

    config: TrainConfig
    ranks: int
    label: str
    metrics: tuple[Metric, ...] = (HEADLINE,)
    """The metrics that its result may have; others in it are left alone."""

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
