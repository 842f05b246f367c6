"""A job: one run of an ablation, in a folder that is named by its training, and which process may train it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttricks.config import ConfigError, TrainConfig
from fasttricks.runs.folder import differences, read_config
from fasttricks.system.ownership import Claim, InUseError
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import fields, number, text, whole
from fasttricks.tasks.classification import CLASSIFICATION

RESULT = "result.json"
"""What a finished run holds besides the trainer's own files; a run without it is not finished."""

METRICS = CLASSIFICATION.metrics
"""Of the task that an ablation's runs train."""
HEADLINE = METRICS[0]
"""What cells are compared by."""


def one_image(data: Mapping[str, Any]) -> float:
    """What one validation image is of the headline, in points; data: as preflight.check_data gives it."""
    return 100 / int(data["val_images"])


_RESULTS = Reader(ConfigError, "must be what an ablation's run left", "remove its folder, and the run is done again")
_NUMBERS = dict.fromkeys(("val_loss", "train_seconds", *(metric.name for metric in METRICS)), number())
_RESULT = fields(
    {"cpu_seconds": number(), "versions": fields({"commit": text()})},
    {"ranks": whole(1), "diverged": text(10_000), "device": text(), **_NUMBERS},
)


@dataclass(frozen=True)
class Job:
    """One run: a cell's training with one seed."""

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
        if not is_there(file):
            return None
        changed = differences(read_config(self.folder), self.config)
        if changed:
            rule = f"was run with other fields ({'; '.join(changed)}); remove it, or give another --run-dir"
            raise ConfigError(f"run_dir = {str(self.folder)!r}: {rule}")
        result: dict[str, Any] = _RESULTS.json(file, _RESULT)
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
