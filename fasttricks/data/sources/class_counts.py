"""How many images each class has. No torch, no DALI."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fasttricks.config import show_name
from fasttricks.data.sources import Source
from fasttricks.data.sources.label_sets import class_sums, set_sizes, sets_of


def class_counts(source: Source) -> NDArray[np.int64]:
    """(K,): the images of each class of `source`, bad ones too."""
    return class_sums(source)


def describe_counts(source: Source) -> str:
    """The fewest and the most images a class, in words: 11 to 160 images a class (fewest: crow, most: ant).

    Where an image has several labels, also how many.
    """
    told = _labels_told(source) if sets_of(source) else ""
    counts = class_counts(source)
    least, most = int(counts.argmin()), int(counts.argmax())
    if counts[least] == counts[most]:
        return f"{counts[most]:,} images a class{told}"
    names = f"fewest: {show_name(source.classes[least])}, most: {show_name(source.classes[most])}"
    return f"{counts[least]:,} to {counts[most]:,} images a class ({names}){told}"


def _labels_told(source: Source) -> str:
    sizes = set_sizes(source)
    return f"; {sizes.min()} to {sizes.max()} labels an image, {sizes.mean():.2f} on average"
