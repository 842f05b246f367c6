"""Whether a run may begin in its folder: it is no other process's, and holds nothing, this run, or one with nothing to lose."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from fasttricks.config import ConfigError, TrainConfig
from fasttricks.runs.folder import differences, no_place, read_config
from fasttricks.runs.stored import newest_checkpoint
from fasttricks.system.ownership import PATIENCE_S, Claim, InUseError, require_free
from fasttricks.system.process import restart_count
from fasttricks.system.reading import is_there

LOCK = ".lock"
_MADE_AT_FIRST = re.compile(
    r"checkpoints|wandb|loggers\.json|config\.json|metrics\.jsonl|metrics\.csv|console\.log|events\.out\.tfevents\..+"
    r"|\.(config\.json|metrics\.jsonl|metrics\.csv|loggers\.json)\.\d+\.tmp"
)
"""The files that a run makes before its first step is logged."""
_UNFINISHED = re.compile(r"\.step-\d+\.pt\.\d+\.tmp")
_DYING_S = 30.0
"""After a restart by torchrun the previous main rank may still be returning a GPU's memory."""


def check_unused(config: TrainConfig) -> None:
    """See that no other process trains in config.run_dir. Changes nothing. Waits for one that was just killed.

    Raises ConfigError, naming it, and where that cannot be seen.
    """
    try:
        require_free(Path(config.run_dir) / LOCK, patience_s=_patience_s())
    except InUseError as error:
        raise _in_use(config, error) from error
    except OSError as error:  # something else has the lock's name
        raise no_place(config, error) from error


def claim_run(config: TrainConfig) -> Claim:
    """The run folder, made where it is not there, for this process alone. For the main rank.

    Raises ConfigError where another process has it, and where it cannot be made.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Claim(folder / LOCK, patience_s=_patience_s())
    except InUseError as error:
        raise _in_use(config, error) from error
    except OSError as error:
        raise no_place(config, error) from error


def _patience_s() -> float:
    return _DYING_S if restart_count() else PATIENCE_S


def _in_use(config: TrainConfig, error: InUseError) -> ConfigError:
    return ConfigError(f"run_dir = {config.run_dir!r}: {error}, or give another --run-dir")


def check_run_dir(config: TrainConfig) -> None:
    """See that the run may be written to config.run_dir. Changes nothing.

    Raises ConfigError where a run is there and --resume is not given, and where it is a run of another config. The
    epochs of a run with a checkpoint may differ: resume.py knows when.
    """
    folder = Path(config.run_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            f"run_dir = {config.run_dir!r}: must be a folder, but a file is there; give another --run-dir"
        )
    if not folder.is_dir() or is_empty_run(folder):
        return
    if not config.resume:
        rule = "already exists and is never overwritten; add --resume to resume it, or give another --run-dir"
        raise ConfigError(f"run_dir = {config.run_dir!r}: {rule}")
    if not is_there(folder / "config.json"):
        raise ConfigError(
            f"run_dir = {config.run_dir!r}: must hold a run (config.json) to resume; give another --run-dir"
        )
    lenient = ["accumulate"] if config.allow_other_ranks else []  # resume.py knows where that may differ
    lenient += ["epochs"] if newest_checkpoint(folder / "checkpoints") else []
    changed = differences(read_config(folder), config, lenient)
    if changed:
        rule = f"a run resumes only with its own config; changed: {'; '.join(changed)}"
        raise ConfigError(f"run_dir = {config.run_dir!r}: {rule}")


def is_empty_run(folder: Path) -> bool:
    """Whether `folder` is empty, or holds a run that ended before it had anything to lose: it may be taken over.

    That is a run without a checkpoint and without a whole record in metrics.jsonl. Anything else there is the user's: a file of
    another name, a config.json that no run wrote, a link.
    """
    names = set()
    for path in (path for path in folder.iterdir() if not path.name.startswith(LOCK)):
        regular = path.is_dir() if path.name in ("checkpoints", "wandb") else path.is_file()
        if path.is_symlink() or not regular or not _MADE_AT_FIRST.fullmatch(path.name):
            return False
        if not path.name.startswith("."):
            names.add(path.name)
    if "checkpoints" in names and not all(_UNFINISHED.fullmatch(name) for name in os.listdir(folder / "checkpoints")):
        return False
    if "config.json" not in names:
        return names <= {"checkpoints"}
    try:
        read_config(folder)
    except (ConfigError, OSError, ValueError):
        return False
    return "metrics.jsonl" not in names or not _has_a_record(folder / "metrics.jsonl")


def _has_a_record(metrics: Path) -> bool:
    try:
        with open(metrics, "rb") as file:
            return isinstance(json.loads(file.readline()), dict)
    except ValueError:
        return False  # empty, or torn by a kill
