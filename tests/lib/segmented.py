"""A tiny run of task segmentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fasttricks.config import TrainConfig
from fasttricks.config.cli import parse_recipe
from lib.tiny import SHRINK, arguments

OPTIONS = [
    *("--model.name", "resnet8d", "--segment.base-size", "40", "--data.val-resize", "40", "--global-batch-size", "8"),
    *("--ema-decay", "0.9", "--checkpoint-steps", "1", "--log-steps", "1", "--no-sync-batch-norm"),
]


def arguments_for(data: Path, run_dir: Path, *more: str) -> list[str]:
    return arguments(data, run_dir, *OPTIONS, *more, recipe="segment-ade20k", shrink=SHRINK)


def config_for(data: Path, run_dir: Path, *more: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(parse_recipe(arguments_for(data, run_dir, *more), prog="test"), **changes)
