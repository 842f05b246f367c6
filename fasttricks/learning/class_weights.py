"""The weight of each class in the loss: balanced, or of a file. Scaled so that the mean over the training images is 1."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttricks.config import ConfigError, nearest, show_name
from fasttricks.data.sources import Source
from fasttricks.data.sources.class_counts import class_counts
from fasttricks.system.reading import Reader

BALANCED = "balanced"
_RULE = "must hold a class and its weight in each line, as ant,2.5, for every class once"
_FILES = Reader(ConfigError, _RULE, "mend the file, or take --loss.class-weights balanced", max_bytes=1 << 24)


def class_weights(chosen: str, train: Source) -> Tensor | None:
    """(K,) float32 on the CPU: the weight of each class of `train` by loss.class_weights; None where that is empty.

    balanced: N / (K n) for a class of n of the N images, of K classes that have any. Both kinds are scaled so that the mean over
    the images is 1: the learning rate keeps its meaning. Raises ConfigError for a file that does not name each class once with
    a weight of 0 or more, and for one by which every image weighs 0.
    """
    if not chosen:
        return None
    counts = class_counts(train)
    raw = 1 / np.maximum(counts, 1) if chosen == BALANCED else _read(Path(chosen), train.classes)
    total = float(raw @ counts)
    if total <= 0:
        raise _FILES.refusal(chosen, "every image weighs 0")
    return torch.from_numpy((raw * (counts.sum() / total)).astype(np.float32))


def _read(path: Path, classes: tuple[str, ...]) -> NDArray[np.float64]:
    try:
        text = _FILES.read(path).decode("utf-8-sig", "surrogateescape")
        rows = [(n, row) for n, row in enumerate(csv.reader(text.splitlines(), strict=True), 1) if row]
    except csv.Error as error:
        raise _FILES.refusal(path, error) from error
    weights: dict[str, float] = {}
    for number, row in rows:
        name = row[0].strip()
        if number == 1 and [cell.strip().lower() for cell in row] == ["class", "weight"] and name not in classes:
            continue
        if len(row) != 2:
            raise _FILES.refusal(path, f"line {number} has {len(row)} columns")
        if name not in classes:
            near = nearest(name, classes)
            hint = f", the nearest is {show_name(near)}" if near else ""
            raise _FILES.refusal(path, f"line {number}: the data has no class {show_name(name)}{hint}")
        if name in weights:
            raise _FILES.refusal(path, f"line {number}: {show_name(name)} stands in it twice")
        weights[name] = _number(path, number, row[1])
    missing = [name for name in classes if name not in weights]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _FILES.refusal(path, f"it lacks {show_name(missing[0])}{more}")
    return np.array([weights[name] for name in classes])


def _number(path: Path, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise _FILES.refusal(path, f"line {line}: {show_name(text)} is no number of 0 or more")
    return value
