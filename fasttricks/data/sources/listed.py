"""Images that are listed by name, each of them a range of bytes of a file. All sources of this package use it.

No torch, no DALI.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from errno import EFBIG
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fasttricks.data.sources.label_sets import Sets, relabel
from fasttricks.system.reading import read_range, regular_file

LARGEST_IMAGE = 1 << 29  # bytes; more is no image, and would be read into memory


if TYPE_CHECKING:
    from typing import Self


class Where(NamedTuple):
    """Where the bytes of an image lie."""

    path: str
    start: int = 0
    length: int = -1
    """-1: the whole file."""


@dataclass(frozen=True)
class ListedImages(ABC):
    """The images of one split: `files[i]` is of class `classes[labels[i]]`."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    """CLASS/IMAGE, as in a folder of class folders."""
    labels: tuple[int, ...]
    bad: Mapping[int, str] = field(default_factory=dict, kw_only=True)
    """Images that are known not to be used, by number, and why."""
    numbered: bool = field(default=False, kw_only=True)
    """Whether the data itself gives the classes their numbers, in the order of `classes`."""
    sets: Sets = field(default=(), kw_only=True)
    """Several labels an image: image `i` is of the classes `sets[labels[i]]`, by number. Empty: of `labels[i]` alone."""

    def __len__(self) -> int:
        return len(self.files)

    @abstractmethod
    def locate(self, index: int) -> Where:
        """Where the bytes of image `index` lie."""

    def read(self, index: int) -> bytes:
        """The bytes of image `index`. From any thread. Raises OSError."""
        return read_at(self.locate(index))

    def name(self, index: int) -> str:
        """The name of image `index`: its path in the folder."""
        return self.files[index]

    def relabelled(self, classes: tuple[str, ...]) -> Self:
        """The same images, their labels in the order of `classes`, which are the same too."""
        labels, sets = relabel(self, classes)
        return replace(self, classes=classes, labels=labels, sets=sets)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names and labels."""
        return digest_of(self.files, self.labels, sets=self.sets)


def digest_of(names: Iterable[str], labels: Sequence[int], altered: str = "", sets: Sets = ()) -> str:
    """16 hexadecimal digits of names and labels; 8 more of how images were altered that have the names of others."""
    digest = hashlib.blake2b(os.fsencode("\0".join(names)), digest_size=8)
    digest.update(repr([sets[label] for label in labels]).encode() if sets else array("q", labels).tobytes())
    return digest.hexdigest() + (hashlib.blake2b(altered.encode(), digest_size=4).hexdigest() if altered else "")


def read_at(place: Where) -> bytes:
    """The bytes there. Raises OSError, also where no file is there, and for 0.5 GB or more. Never waits for a pipe's end."""
    with regular_file(place.path) as (descriptor, size):
        length = size if place.length < 0 else place.length
        if length >= LARGEST_IMAGE:
            raise OSError(EFBIG, f"{length:,} bytes long")
        return read_range(descriptor, place.start, length)


def is_numbered(source: object) -> bool:
    """Whether the data of `source` gives its classes their numbers."""
    return bool(getattr(source, "numbered", False))
