"""The weight of each class in the loss, of an image or of a pixel: balanced, or of a file."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttricks.config import ConfigError, nearest, show_name
from fasttricks.data.masks.frequencies import class_pixels
from fasttricks.data.masks.source import MaskSource
from fasttricks.data.sources import Source
from fasttricks.data.sources.class_counts import class_counts
from fasttricks.data.sources.errors import DataError
from fasttricks.system.reading import Reader

BALANCED = "balanced"
_RULE = "must hold a class and its weight in each line, as ant,2.5, for every class once"
_FILES = Reader(ConfigError, _RULE, "mend the file, or take --loss.class-weights balanced", max_bytes=1 << 24)


def class_weights(chosen: str, train: Source, *, max_pixels: int) -> Tensor | None:
    """(K,) float32 on the CPU: the weight of each class of `train` by loss.class_weights; None where that is empty.

    balanced: N / (K n) for a class of n of the N images, of K classes that have any. Both kinds are scaled so that the mean over
    the images is 1: the learning rate keeps its meaning. Raises ConfigError for a file that does not name each class once with
    a weight of 0 or more, and for one by which every image weighs 0.

    For masks the weights are those of pixels, and their scale has no effect (tasks.pixels.pixel_loss). balanced: as
    median_frequency(), whose counts cost a look at every mask of at most max_pixels, once.
    """
    if not chosen:
        return None
    if isinstance(train, MaskSource):
        return _of_pixels(chosen, train, max_pixels)
    counts = class_counts(train)
    raw = 1 / np.maximum(counts, 1) if chosen == BALANCED else _read(Path(chosen), train.classes)
    total = float(raw @ counts)
    if total <= 0:
        raise _FILES.refusal(chosen, "every image weighs 0")
    return torch.from_numpy((raw * (counts.sum() / total)).astype(np.float32))


def _of_pixels(chosen: str, train: MaskSource, max_pixels: int) -> Tensor:
    weights = (
        median_frequency(*class_pixels(train, max_pixels)) if chosen == BALANCED else _read(Path(chosen), train.classes)
    )
    if not weights.any():
        if chosen == BALANCED:
            raise DataError(f"{train.place}: no pixel of a training mask has a class; leave loss.class_weights out")
        raise _FILES.refusal(chosen, "every pixel weighs 0")
    return torch.from_numpy(weights.astype(np.float32))


def median_frequency(pixels: NDArray[np.int64], beside: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K,): the median of the classes' frequencies divided by that of each; 0 for a class without a pixel.

    pixels, beside: (K,), as data.masks.frequencies.Frequencies. The frequency of a class is the share that it has of the valid
    pixels in the masks that have it. Source: Eigen and Fergus 2015, section 6; SegNet (Badrinarayanan et al. 2015), section 4.
    """
    there = pixels > 0
    weights = np.zeros(len(pixels))
    frequencies = pixels[there] / beside[there]
    weights[there] = np.median(frequencies) / frequencies if there.any() else 0
    return weights


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
