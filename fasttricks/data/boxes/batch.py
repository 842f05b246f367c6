"""The images and boxes of one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class BoxBatch:
    """N images and their objects on the device, in lists, as torchvision's detectors take them. N may be 0."""

    images: list[Tensor]
    """(3, h, w) each, normalised, in the dtype asked for."""
    boxes: list[Tensor]
    """(n, 4) float32 each: left, top, right, bottom edge, in the pixels of `images`."""
    labels: list[Tensor]
    """(n,) int64 each: 0 to number of classes - 1, without a number for the background."""
    difficult: list[Tensor]
    """(n,) bool each, as Boxes.difficult."""
    sizes: NDArray[np.int64]
    """(N, 2), on the host: height and width of the image shown, as it is stored, upright."""
    places: NDArray[np.int64] | None = None
    """(N,), on the host: the numbers of the images whose turn it was, which decide the random numbers; None: not known."""
    shown: NDArray[np.int64] | None = None
    """(N,), on the host: the numbers of the images that are shown, another than in `places` where that one is bad."""

    def __len__(self) -> int:
        """N."""
        return len(self.images)
