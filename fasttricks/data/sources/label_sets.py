"""Several labels an image: sets of classes, which the labels of a source number. No torch, no DALI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fasttricks.data.sources import Source

Sets = tuple[tuple[int, ...], ...]
"""Sets of classes, each as their numbers, rising."""


class Labelled(Protocol):
    """Images with labels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The class of each image, or the number of its set."""

    @property
    def sets(self) -> Sets:
        """Image i is of the classes sets[labels[i]]. Empty: of the class labels[i] alone."""


def sets_of(source: object) -> Sets:
    """The sets of classes that the labels of `source` number; empty where a label is the number of a class."""
    found: Sets = getattr(source, "sets", ())
    return found


def relabel(images: Labelled, classes: tuple[str, ...]) -> tuple[tuple[int, ...], Sets]:
    """(labels, sets) of `images` in the order of `classes`, which are its own."""
    number = {name: label for label, name in enumerate(classes)}
    new = [number[name] for name in images.classes]
    if images.sets:
        return images.labels, tuple(tuple(sorted(new[label] for label in one)) for one in images.sets)
    return tuple(new[label] for label in images.labels), ()


def set_table(sets: Sets, num_classes: int) -> NDArray[np.bool_]:
    """(S, K): whether the class is in the set."""
    table = np.zeros((len(sets), num_classes), bool)
    for row, one in zip(table, sets, strict=True):
        row[list(one)] = True
    return table


def class_sums(source: Source, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """(K,): the images of each class of `source`; chosen: (N,), those of them that count; None: all."""
    labels = np.asarray(source.labels, np.int64)
    labels = labels if chosen is None else labels[chosen]
    sets, num_classes = sets_of(source), len(source.classes)
    if not sets:
        return np.bincount(labels, minlength=num_classes)
    counts: NDArray[np.int64] = np.bincount(labels, minlength=len(sets)) @ set_table(sets, num_classes).astype(np.int64)
    return counts


def set_sizes(source: Source) -> NDArray[np.int64]:
    """(N,): the labels of each image."""
    sizes = np.array([len(one) for one in sets_of(source)], np.int64)
    return sizes[np.asarray(source.labels, np.int64)]
