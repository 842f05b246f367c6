"""A run folder at a glance: state and scores, of whichever release, also where it is damaged or in training. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttricks.config import TrainConfig, UserError, flatten
from fasttricks.runs.begin import LOCK
from fasttricks.runs.epochs import PART, EpochTable
from fasttricks.runs.folder import CONFIGS, earlier_starts, read_config
from fasttricks.runs.records import METRICS, each_record
from fasttricks.system.ownership import InUseError, require_free
from fasttricks.system.reading import is_there
from fasttricks.system.schema import anything, table

_NOT_A_SCORE = ("val_loss", "val_images")
_TRAINING = ("step", "epoch", "lr", "train_loss", "images_per_sec")
SUMMARIES = dataclasses.replace(CONFIGS, max_bytes=1 << 28)
"""It names every bad image."""
UNLIKE = ("run_dir", "resume")
"""Fields that say nothing about a run."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A run. None or empty: not known."""

    folder: Path
    problem: str = ""
    """Why it cannot be read; all else is then unknown."""
    config: TrainConfig | None = None
    state: str = ""
    """finished, stopped early, training, or stopped."""
    started: str = ""
    """When it was started last: ISO 8601."""
    rows: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """A row an epoch, as metrics.csv has them."""
    metrics: tuple[str, ...] = ()
    """The names of the scores of its last validation, the headline first."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    @property
    def validations(self) -> list[Mapping[str, Any]]:
        """The rows that have the headline metric."""
        return [row for row in self.rows if self.metrics and row.get(self.metrics[0]) is not None]

    @property
    def last(self) -> Mapping[str, Any]:
        """The last validation; empty before there is one."""
        return self.validations[-1] if self.validations else {}

    @property
    def best(self) -> Mapping[str, Any]:
        """The first validation of the highest headline metric; empty before there is one whose metric is not NaN."""
        rated = [row for row in self.validations if not math.isnan(row[self.metrics[0]])]
        return max(rated, key=lambda row: row[self.metrics[0]], default={})

    @property
    def images_per_sec(self) -> float | None:
        """The rate of training in the last epoch that has one."""
        return next((row["images_per_sec"] for row in reversed(self.rows) if row.get("images_per_sec")), None)

    def fields(self) -> dict[str, Any]:
        """The fields of its config by dotted name, without those that say nothing about a run."""
        flat = flatten(dataclasses.asdict(self.config)) if self.config is not None else {}
        return {name: value for name, value in flat.items() if name not in UNLIKE}

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON, which has no NaN and no infinity: they are None."""
        config = self.config
        return {
            "run": str(self.folder),
            **({"problem": self.problem} if self.problem else {}),
            "recipe": config.recipe if config else None,
            "state": self.state or None,
            "epoch": self.epoch,
            "epochs": config.epochs if config else None,
            "last": {name: _finite(self.last.get(name)) for name in (*self.metrics, "val_loss")} if self.last else None,
            "best": {"epoch": self.best["epoch"], self.metrics[0]: _finite(self.best[self.metrics[0]])}
            if self.best
            else None,
            "images_per_sec": _finite(self.images_per_sec),
            "started": self.started or None,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def look_at(folder: Path) -> Overview:
    """The run in `folder`. One that cannot be read has a problem, in words. Reads all of metrics.jsonl, a line at a time."""
    try:
        if not is_there(folder / "config.json"):
            missing = "no such folder" if not folder.exists() else "no run: it has no config.json"
            return Overview(folder=folder, problem=missing)
        config = read_config(folder)
        rows = _rows(folder)
        starts = earlier_starts(folder)
        other = (*_TRAINING, *_NOT_A_SCORE)
        named = (tuple(n for n in row if n not in other and not n.startswith(PART)) for row in reversed(rows))
        return Overview(
            folder=folder,
            config=config,
            state=_state(folder, config, rows),
            started=starts[-1].get("date", "") if starts else "",
            rows=rows,
            metrics=next(filter(None, named), ()),
        )
    except (UserError, OSError) as error:
        return Overview(folder=folder, problem=str(error).removeprefix(f"{folder}/"))


def _rows(folder: Path) -> tuple[Mapping[str, Any], ...]:
    epochs = EpochTable()
    for record, _ in each_record(folder / METRICS, whole=True):
        epochs.add(record)
    return epochs.rows


def _state(folder: Path, config: TrainConfig, rows: tuple[Mapping[str, Any], ...]) -> str:
    try:
        require_free(folder / LOCK, patience_s=0)
    except InUseError:
        return "training"
    except (UserError, OSError):
        pass
    summary = SUMMARIES.json(folder / "summary.json", table(anything)) if is_there(folder / "summary.json") else {}
    done = int(rows[-1]["epoch"]) if rows else 0
    if summary and summary.get("steps") == (rows[-1]["step"] if rows else None):
        return "stopped early" if summary.get("stopped_early") else "finished"
    return "stopped" if done < config.epochs or not summary else "finished"


def find_runs(place: Path) -> list[Path]:
    """`place` itself where it is a run, else the run folders in it; empty where it has none. Raises OSError."""
    if is_there(place / "config.json"):
        return [place]
    if not place.is_dir():
        return []
    return sorted(folder for folder in place.iterdir() if folder.is_dir() and is_there(folder / "config.json"))


def differing_fields(runs: list[Overview]) -> dict[str, list[Any]]:
    """Field -> its value in each run, of those that are not the same in all; None where a run lacks it."""
    fields = [run.fields() for run in runs]
    names = dict.fromkeys(name for one in fields for name in one)
    found = {name: [one.get(name) for one in fields] for name in names}
    return {name: values for name, values in found.items() if len(set(map(json.dumps, values))) > 1}
