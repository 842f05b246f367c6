"""The images and masks of one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class MaskBatch:
    """N images and their masks on the device. N may be smaller at the end of an epoch, and 0."""

    images: Tensor
    """(N, 3, h, w), channels-last in memory, normalised, in the dtype asked for. In training h = w = data.image_size."""
    masks: Tensor
    """(N, H, W) int64: 0 to number of classes - 1, or IGNORED. In training of size (h, w), in validation of the image's own."""
    places: NDArray[np.int64] | None = None
    """(N,), on the host: the numbers of the images whose turn it was, which decide the random numbers; None: not known."""
    shown: NDArray[np.int64] | None = None
    """(N,), on the host: the numbers of the images that are shown, another than in `places` where that one is bad."""

    def __len__(self) -> int:
        """N."""
        return len(self.masks)
