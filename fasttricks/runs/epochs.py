"""metrics.csv: a row an epoch, for a spreadsheet; made of the records of metrics.jsonl alone. No torch."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttricks.system.files import remove_leftovers, temporary_of

FILE = "metrics.csv"
_COLUMNS = ("epoch", "step", "lr", "train_loss", "images_per_sec")
LOSS = "train_loss"
PART = f"{LOSS}_"
"""The first letters of the name of a part of the loss."""
_OF_A_RECORD = ("step", "epoch", "unix_time")


class EpochTable:
    """The rows so far: epoch, the updates done at its end, lr of the last of them, the mean of the training loss over the epoch's
    updates, images per second of training; then the means of the parts of the loss, where it has some; then the metrics of the
    validation after it, empty where there was none.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._metrics: dict[str, None] = {}
        """Their names, in the order of their first record."""
        self._parts: dict[str, None] = {}
        """The names of the parts of the loss, in order."""
        self._step = self._steps = 0
        self._losses: dict[str, float] = {}
        self._seconds = 0.0

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take in the next record of metrics.jsonl. Returns whether it has changed the rows."""
        if LOSS in record:
            return self._train(record)
        found = {name: value for name, value in record.items() if name not in _OF_A_RECORD}
        self._metrics |= dict.fromkeys(found)
        if not self._rows or self._rows[-1]["step"] != record["step"]:  # the losses of its last steps were skipped
            self._end(record)
        self._rows[-1] |= found
        return True

    def _train(self, record: Mapping[str, Any]) -> bool:
        steps, self._step = record["step"] - self._step, record["step"]
        self._steps += steps
        for name in (name for name in record if name == LOSS or name.startswith(PART)):
            self._losses[name] = self._losses.get(name, 0.0) + steps * record[name]
        rate = record.get("images_per_sec", math.nan)
        self._seconds += steps / rate if rate else math.nan  # as if a step had one image
        if record["epoch"] != round(record["epoch"]):
            return False
        self._end(record)
        return True

    def _end(self, record: Mapping[str, Any]) -> None:
        row = {"epoch": round(record["epoch"]), "step": record["step"], "lr": record.get("lr")}
        if self._steps:
            row |= {name: loss / self._steps for name, loss in self._losses.items()}
            row["images_per_sec"] = self._steps / (self._seconds or math.nan)
            self._parts |= dict.fromkeys(name for name in self._losses if name != LOSS)
        self._rows.append(row)
        self._steps, self._losses, self._seconds = 0, {}, 0.0

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """The rows so far, by the names of the columns; a value that is not known is absent or None."""
        return tuple(self._rows)

    def write(self, folder: Path) -> None:
        """Replace metrics.csv in `folder`. Raises OSError."""
        text = io.StringIO()
        table = csv.DictWriter(text, [*_COLUMNS, *self._parts, *self._metrics], lineterminator="\n")
        table.writeheader()
        table.writerows(self._rows)
        temporary = temporary_of(folder / FILE)
        temporary.write_text(text.getvalue(), "utf-8")
        os.replace(temporary, folder / FILE)

    def start(self, folder: Path, step: int) -> None:
        """As write(), without the remains of a process that was killed. step: the updates before the first record to come."""
        self._step = self._step or step
        remove_leftovers(folder, r"metrics\.csv")
        self.write(folder)
