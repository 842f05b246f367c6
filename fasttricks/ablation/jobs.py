"""A job: one run of an ablation, in a folder that is named by its training, and which process may train it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttricks.config import ConfigError, TrainConfig
from fasttricks.runs.folder import differences, read_config

RESULT = "result.json"
"""What a finished run holds besides the trainer's own files; a run without it is not finished."""


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
        if not file.is_file():
            return None
        changed = differences(read_config(self.folder), self.config)
        if changed:
            rule = f"was run with other fields ({'; '.join(changed)}); remove it, or give another --run-dir"
            raise ConfigError(f"run_dir = {str(self.folder)!r}: {rule}")
        result: dict[str, Any] = json.loads(file.read_text())
        return result


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
