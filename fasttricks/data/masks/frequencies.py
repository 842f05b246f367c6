"""The pixels of each class in the masks of a split: counted once, and kept in the user's cache. No torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.data.masks.pixels import decode_mask
from fasttricks.data.masks.source import MaskSource
from fasttricks.data.sources.cache import kept_columns, name_of
from fasttricks.data.sources.checked import in_threads
from fasttricks.data.sources.decode import BadImage, quiet_pillow
from fasttricks.data.sources.errors import DataError

_KINDS = {"pixels": "<i8", "beside": "<i8"}


class Frequencies(NamedTuple):
    """Pixels by class, in whole numbers, of the masks of a split. An ignored pixel counts in neither."""

    pixels: NDArray[np.int64]
    """(K,): those of the class."""
    beside: NDArray[np.int64]
    """(K,): those of any class in the masks that have one of the class."""


def class_pixels(source: MaskSource, max_pixels: int) -> Frequencies:
    """The Frequencies of the masks of `source`, without those that are bad: the loader names these, and shows none.

    Cost: each mask is read and decoded, in threads, with a bar: milliseconds a mask. Once for the same files: the counts are kept
    in the user's cache, and other processes that want them wait. Raises DataError where the cache cannot be written, or a file
    cannot be looked at.
    """
    masks = [number for number in range(len(source)) if number not in source.bad]

    def count() -> dict[str, NDArray[np.int64]]:
        quiet_pillow()
        found = in_threads(
            f"count the pixels of {source.place}", masks, lambda number: _count(source, number, max_pixels)
        )
        counts = np.array(found, np.int64).reshape(-1, len(source.classes))
        beside = ((counts > 0) * counts.sum(1, keepdims=True)).sum(0)
        return {"pixels": counts.sum(0), "beside": beside}

    how = len(source.classes), source.first, max_pixels
    try:
        name = name_of("pixels", source.root, [source.masks[number] for number in masks], *how)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; bring it back") from error
    return Frequencies(**kept_columns(name, source.root, _KINDS, count))


def _count(source: MaskSource, number: int, max_pixels: int) -> NDArray[np.int64]:
    try:
        return decode_mask(source.read_mask(number), len(source.classes), source.first, max_pixels)[1]
    except (OSError, BadImage):
        return np.zeros(len(source.classes), np.int64)
