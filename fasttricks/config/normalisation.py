"""The mean and deviation that images are normalised by, R, G and B on the scale of 0 to 255."""

from __future__ import annotations

from collections.abc import Sequence

Statistics = tuple[Sequence[float], Sequence[float]]
"""(mean, std), three numbers each."""

IMAGENET_MEAN = (123.68, 116.779, 103.939)
IMAGENET_STD = (58.393, 57.12, 57.375)
"""Section 2.1."""


def same_statistics(one: Statistics, other: Statistics) -> bool:
    """Whether images come out the same to within half of one of 255 grey levels: 0.485 is 123.675, and the paper's is 123.68."""
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) < 0.5 for a, b in pairs)


def show_statistics(statistics: Statistics) -> str:
    """Mean and std as options of the command line: --data.mean 123.68 116.779 103.939 --data.std 58.393 57.12 57.375."""
    mean, std = (" ".join(f"{round(value, 3):g}" for value in values) for values in statistics)
    return f"--data.mean {mean} --data.std {std}"
