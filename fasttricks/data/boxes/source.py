"""The images and boxes of one split, by number. No torch, no DALI."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fasttricks.data.sources.listed import Where, digest_of, read_at


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of one image, in the order of its annotation; n may be 0."""

    xyxy: NDArray[np.float32]
    """(n, 4), pixels: left, top, right, bottom edge, 0 at the image's left and upper edge. VOC's corner pixels x1 to x2, counted
    from 1, are the edges x1 - 1 and x2. Right is above left, bottom above top, all within the image."""
    labels: NDArray[np.int64]
    """(n,): 0 to number of classes - 1."""
    difficult: NDArray[np.bool_]
    """(n,): an object that the annotator found hard to see; neither found nor missed in a metric."""

    def __len__(self) -> int:
        """n."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class BoxSource:
    """Image `i` is the file `images[i]`, and `boxes(i)` are the objects on it. A Source.

    Its answers never change. It may be asked from any thread and any process. Memory: 25 bytes a box.
    """

    root: Path
    """The folder data.root."""
    lists: tuple[str, ...]
    """The lists of the images, relative to root, with / between their parts; for messages."""
    classes: tuple[str, ...]
    images: tuple[str, ...]
    """Paths relative to root, with / between their parts; no two are the same."""
    sizes: NDArray[np.int64]
    """(N, 2): height and width by the annotation, pixels; 0 where the image is bad."""
    ends: NDArray[np.int64]
    """(N,): the boxes of image `i` are those from ends[i - 1], or 0, to ends[i]."""
    every: Boxes
    """The boxes of all images, one image after the other."""
    bad: Mapping[int, str] = field(default_factory=dict)
    """Images that are known beforehand not to be used, by number, and why."""
    strays: Mapping[str, str] = field(default_factory=dict)
    """Lines of a list that name an image again, by place, and why."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Boxes of good images that are left out, by annotation and object, and why."""
    clamped: Mapping[str, str] = field(default_factory=dict)
    """Boxes of good images that reached out of the image by at most a pixel and end at its edge, by annotation and object."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Sequence[int]:
        """Zeros: an image has no class of its own."""
        return array("q", bytes(8 * len(self)))

    @property
    def place(self) -> str:
        """The lists of the split's images, for messages."""
        return f"{self.root}{os.sep}{' and '.join(self.lists)}"

    def locate(self, index: int) -> Where:
        """The whole file of image `index`."""
        return Where(f"{self.root}{os.sep}{self.images[index]}")

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises OSError."""
        return read_at(self.locate(index))

    def boxes(self, index: int) -> Boxes:
        """The objects on image `index`, without those in `left_out`; none where it is bad."""
        part = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return Boxes(self.every.xyxy[part], self.every.labels[part], self.every.difficult[part])

    def name(self, index: int) -> str:
        """The path of image `index`, relative to root; no two share it."""
        return self.images[index]

    def fingerprint(self) -> str:
        """The same for the same names of classes and images in the same order with the same boxes, and for no others."""
        boxes = [one.tobytes().hex() for one in (self.every.xyxy, self.every.difficult)]
        return digest_of(
            [*self.classes, "", *self.images, "", *boxes], [*self.ends.tolist(), *self.every.labels.tolist()]
        )
