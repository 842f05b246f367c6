"""The images and labels of one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """N images and their labels on the device. N may be smaller at the end of an epoch, and 0."""

    images: Tensor
    """(N, 3, S, S), channels-last in memory, normalised, in the dtype asked for."""
    labels: Tensor
    """(N,) int64, 0 to number of classes - 1; of several labels an image (N, K) float32: 1 for its classes, else 0."""
    places: NDArray[np.int64] | None = None
    """(N,), on the host: the numbers of the images whose turn it was, which decide crop, flip and colour; None: not known."""
    shown: NDArray[np.int64] | None = None
    """(N,), on the host: the numbers of the images that are shown, another than in `places` where that one is bad."""

    def __len__(self) -> int:
        """N."""
        return len(self.labels)
