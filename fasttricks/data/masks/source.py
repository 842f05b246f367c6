"""The images and masks of one split, by number. No torch, no DALI."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fasttricks.data.sources.listed import Where, digest_of, read_at

IGNORED = 255
"""The class of a pixel that counts neither in the loss nor in a metric."""
MOST_CLASSES = IGNORED
"""Classes 0 to 254: a pixel's class is a byte, and 255 is IGNORED."""


@dataclass(frozen=True, kw_only=True)
class MaskSource:
    """Image `i` is the file `images[i]`, and the file `masks[i]` has the class of each of its pixels. A Source.

    Its answers never change. It may be asked from any thread and any process.
    """

    root: Path
    """The folder data.root."""
    folder: str
    """The folder of the split's images, relative to root, with / between its parts; for messages."""
    classes: tuple[str, ...]
    images: tuple[str, ...]
    """Paths relative to root, with / between their parts."""
    masks: tuple[str, ...]
    """As images; empty where an image has none, which is bad."""
    first: int
    """The value of class 0 in a mask. 1: 0 is ignored (ADE20K). 0: 255 is ignored."""
    bad: Mapping[int, str] = field(default_factory=dict)
    """Images that are known beforehand not to be used, by number, and why."""
    strays: Mapping[str, str] = field(default_factory=dict)
    """Masks that belong to no image, by name, and why."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Sequence[int]:
        """Zeros: an image has no class of its own."""
        return array("q", bytes(8 * len(self)))

    @property
    def place(self) -> str:
        """The folder of the split's images, for messages."""
        return f"{self.root}{os.sep}{self.folder}"

    def locate(self, index: int) -> Where:
        """The whole file of image `index`."""
        return Where(f"{self.root}{os.sep}{self.images[index]}")

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises OSError."""
        return read_at(self.locate(index))

    def read_mask(self, index: int) -> bytes:
        """The encoded mask of image `index`. Raises OSError, also where it has none."""
        if not self.masks[index]:
            raise FileNotFoundError(f"no mask of {self.name(index)}")
        return read_at(Where(f"{self.root}{os.sep}{self.masks[index]}"))

    def name(self, index: int) -> str:
        """The path of image `index`, relative to root; no two share it."""
        return self.images[index]

    def fingerprint(self) -> str:
        """The same for the same names of classes, images and masks in the same order, and for no others."""
        return digest_of([*self.classes, "", *self.images, "", *self.masks], [self.first])
