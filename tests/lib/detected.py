"""A tiny run of task detection."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fasttricks.config import TrainConfig
from fasttricks.config.cli import parse_recipe
from lib.tiny import DETECT, arguments


def arguments_for(data: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(data, run_dir, *more, recipe="detect-voc", shrink=DETECT)


def config_for(data: Path, run_dir: Path, *more: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(parse_recipe(arguments_for(data, run_dir, *more), prog="test"), **changes)
