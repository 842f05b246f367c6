"""A part of another source: the validation images that data.val_share holds out, the training images that are left, and those of
data.limit_per_class. It stands above the openers, so every kind of source has it. No torch, no DALI.

An image has a number in [0, 1) that depends on its name alone: a hash. It is held out where that is below the share, so images
that are added later move none that are there. A class gets at least one image in each part: where the rule leaves it none for
validation, its image of the least hash is held out; where it leaves none for training, that of the greatest hash stays. These
are the only images that an addition to their class may move. Bad images count for none of this. If images have several
labels, the number alone decides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fasttricks.config import show_name
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.label_sets import Sets, class_sums, relabel, sets_of
from fasttricks.data.sources.listed import Where, digest_of, is_numbered

if TYPE_CHECKING:
    from fasttricks.data.sources import Source

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Some images of another source, in their order there."""

    source: Source
    numbers: tuple[int, ...]
    """The numbers of its images in `source`, rising."""
    classes: tuple[str, ...]
    labels: tuple[int, ...] = field(repr=False)
    sets: Sets = field(default=(), repr=False)
    """As ListedImages.sets."""

    @classmethod
    def of(cls, source: Source, numbers: Sequence[int] | Numbers) -> Part:
        """The images `numbers` of `source`, labelled as there."""
        chosen = tuple(int(number) for number in numbers)
        labels = source.labels
        kept = tuple(int(labels[number]) for number in chosen)
        return cls(source, chosen, tuple(source.classes), kept, sets_of(source))

    @property
    def root(self) -> Path:
        """That of the whole source."""
        return self.source.root

    @property
    def numbered(self) -> bool:
        """Whether the data itself gives the classes their numbers."""
        return is_numbered(self.source)

    @cached_property
    def bad(self) -> Mapping[int, str]:
        """The bad images of the part, by their numbers in it."""
        bad = self.source.bad
        return {at: bad[number] for at, number in enumerate(self.numbers) if number in bad} if bad else {}

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises OSError."""
        return self.source.read(self.numbers[index])

    def locate(self, index: int) -> Where:
        """Where the bytes of image `index` lie."""
        return self.source.locate(self.numbers[index])

    def name(self, index: int) -> str:
        """The name of image `index`, as in the whole source."""
        return self.source.name(self.numbers[index])

    def relabelled(self, classes: tuple[str, ...]) -> Part:
        """The same images, their labels in the order of `classes`, which are the same too."""
        labels, sets = relabel(self, classes)
        return replace(self, classes=classes, labels=labels, sets=sets)

    def fingerprint(self) -> str:
        """That of a folder of these images, so that a run may change over to one."""
        names = [self.name(index) for index in range(len(self))]
        return digest_of(names, self.labels, getattr(self.source, "altered", ""), self.sets)


def hold_out(source: Source, share: float) -> tuple[Part, Part]:
    """(the rest, the images held out for validation) of `source`, by the rule of this file. share: above 0 and below 1.

    If images have several labels, the share alone decides, as no choice suits every class of an image.
    Raises DataError for a class with one good image; of several labels, for one that training would lack, and where validation
    would have no label. Cost: a hash an image.
    """
    place = name_hashes(source)
    held = place < _bound(share)
    labels, good = _labels(source), _good(source)
    if sets_of(source):
        _require_labels(source, share, held, good)
        return Part.of(source, np.flatnonzero(~held)), Part.of(source, np.flatnonzero(held))
    for label, images in _by_class(labels, good):
        if len(images) == 1:
            name = show_name(source.classes[label])
            rule = "has one good image, and validation and training need one each; add images to it, or leave the class out"
            raise DataError(f"data.val_share = {share:g}: class {name} of {show_name(source.root)} {rule}")
        if not held[images].any():
            held[images[np.argmin(place[images])]] = True
        elif held[images].all():
            held[images[np.argmax(place[images])]] = False
    return Part.of(source, np.flatnonzero(~held)), Part.of(source, np.flatnonzero(held))


def _require_labels(source: Source, share: float, held: NDArray[np.bool_], good: NDArray[np.bool_]) -> None:
    """Raise DataError for a class without a good image among those that are not held out, and where no label is held out."""
    counts, names = class_sums(source, good), show_name(source.root)
    trained = class_sums(source, ~held & good)
    rule = "give another share, or a table with a column split"
    if (lost := np.flatnonzero((trained == 0) & (counts > 0))).size:
        name = show_name(source.classes[lost[0]])
        wrong = f"all {counts[lost[0]]} good images of class {name} of {names} would be held out"
        raise DataError(f"data.val_share = {share:g}: {wrong}, and none is left for training; {rule}")
    if not class_sums(source, held & good).any():
        raise DataError(f"data.val_share = {share:g}: no image with a label of {names} is held out; {rule}")


def limit_classes(source: Source, most: int) -> Part:
    """The `most` good images of the least hash of each class, in their order: fewer of a class that has fewer.

    They depend on the names alone, so those of a lower limit are among those of a higher one. Cost: a hash an image.
    """
    place = name_hashes(source)
    kept = [
        images[np.argsort(place[images], kind="stable")[:most]]
        for _, images in _by_class(_labels(source), _good(source))
    ]
    return Part.of(source, np.sort(np.concatenate(kept)) if kept else [])


def name_hashes(source: Source) -> NDArray[np.uint64]:
    """(N,): the hash of each image's name, uniform in 0 to 2^64 - 1."""
    names = (os.fsencode(source.name(index)) for index in range(len(source)))
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _bound(share: float) -> np.uint64:
    """The hash from which on an image is not held out."""
    return np.uint64(min(int(share * 2**64), 2**64 - 1))


def _labels(source: Source) -> Numbers:
    return np.asarray(source.labels, np.int64)


def _good(source: Source) -> NDArray[np.bool_]:
    good = np.ones(len(source), bool)
    good[list(source.bad)] = False
    return good


def _by_class(labels: Numbers, good: NDArray[np.bool_]) -> list[tuple[int, Numbers]]:
    """Each class that has good images, and their numbers, rising."""
    images = np.flatnonzero(good)
    order = images[np.argsort(labels[images], kind="stable")]
    found, starts = np.unique(labels[order], return_index=True)
    return list(zip(found.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else []
