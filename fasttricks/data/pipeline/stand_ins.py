"""Which image stands in for a bad one: as cheap to find where many are bad as where one is. No DALI and no torch here."""

from __future__ import annotations

from functools import cached_property
from threading import Lock

import numpy as np
from numpy.typing import NDArray


class StandIns:
    """The next good image of the same class, round, and where the class has none the next of all.

    From any thread, while another marks images as bad.
    """

    def __init__(self, labels: NDArray[np.int64]) -> None:
        self._labels = labels
        self._is_bad = np.zeros(len(labels), bool)
        self._marked = 0
        self._lock = Lock()
        self._good: dict[int, tuple[int, NDArray[np.int64]]] = {}
        """Class, or -1 for all -> how many were marked when it was made, its good images in order."""

    def mark(self, image: int) -> None:
        """`image` is bad."""
        with self._lock:
            self._is_bad[image] = True
            self._marked += 1

    def after(self, image: int) -> int | None:
        """Who stands in for `image`; None where all are bad.

        Cost: a search, and the first time after a mark() a pass over the class.
        """
        for group in (int(self._labels[image]), -1):
            good = self._good_of(group)
            if len(good):
                return int(good[np.searchsorted(good, image) % len(good)])
        return None

    def _good_of(self, group: int) -> NDArray[np.int64]:
        marked = self._marked  # before the look at who is bad: a mark in between rebuilds it the next time
        made = self._good.get(group)
        if made is None or made[0] != marked:
            images = self._images_of(group)
            self._good[group] = made = marked, images[~self._is_bad[images]]
        return made[1]

    def _images_of(self, group: int) -> NDArray[np.int64]:
        if group < 0:
            return np.arange(len(self._labels))
        order, starts = self._by_class
        return order[starts[group] : starts[group + 1]]

    @cached_property
    def _by_class(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All images by class and then by number, and where each class begins there."""
        order = np.argsort(self._labels, kind="stable")
        classes = np.arange(int(self._labels.max(initial=-1)) + 2)
        return order, np.searchsorted(self._labels[order], classes)
