"""Mean intersection over union and pixel accuracy, from exact counts of pixels by class and prediction."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttricks.data.masks.source import IGNORED
from fasttricks.data.sources.errors import DataError
from fasttricks.system.distributed import World


class PixelScores(NamedTuple):
    """The scores of a split."""

    miou: float
    """%: the mean of `iou` over the classes that have one."""
    pixel_accuracy: float
    """%: pixels classified right."""
    iou: NDArray[np.float64]
    """(K,), %: pixels of a class that are found / pixels that are of it or taken for it; NaN for a class that has neither."""
    confusion: NDArray[np.int64]
    """(K, K): confusion[t, p] pixels of class t are taken for class p."""
    images: NDArray[np.int64] = np.zeros(0, np.int64)
    """(N,): the numbers of the images in the source, ascending; empty where the batches do not number them."""
    image_iou: NDArray[np.float64] = np.zeros(0)
    """(N,), %: of each image alone the mean IoU; NaN for an image whose pixels are all ignored."""


class PixelCounts:
    """Counts of pixels on the device, whole numbers: neither batch size nor ranks change a bit of the scores.

    Pixels of class IGNORED count nowhere. Oracles: torchmetrics.functional.jaccard_index, and a loop in float64
    (tests/test_pixel_counts.py).
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self._num_classes = num_classes
        # one more for ignored pixels and one for pixels of no class: to pick out the others would wait for the device
        self._counts = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, masks: Tensor) -> None:
        """Add the pixels of N images. predicted: (N, H, W) int64, 0 to K - 1; masks: the same shape, also IGNORED. No sync."""
        if predicted.shape != masks.shape:
            raise ValueError(f"predicted is {tuple(predicted.shape)}, masks {tuple(masks.shape)}: must be of one shape")
        k = self._num_classes
        known = (masks >= 0) & (masks < k) & (predicted >= 0) & (predicted < k)
        cell = torch.where(known, masks * k + predicted, torch.where(masks == IGNORED, k * k, k * k + 1)).flatten()
        # bincount would wait for the device, to know the largest
        self._counts.scatter_add_(0, cell, torch.ones_like(cell))

    def add(self, other: PixelCounts) -> None:
        """Add the counts of `other`. No sync."""
        self._counts += other._counts

    def mean_iou(self) -> Tensor:
        """The mean IoU of these counts in percent, of this rank alone, a float64 scalar; NaN without a pixel. No sync."""
        k = self._num_classes
        confusion = self._counts[: k * k].view(k, k)
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        return (100 * right.double() / union).nanmean()  # 0 / 0 is NaN

    def result(self, world: World) -> PixelScores:
        """The scores over the images of all ranks, the same on all. A collective and a sync.

        Raises DataError where every pixel is ignored; ValueError where update() got a class that is none of the K.
        """
        *cells, ignored, strange = world.sum_(self._counts.clone()).tolist()
        if strange:
            raise ValueError(f"{strange} pixels have a class, or a prediction, outside 0 to {self._num_classes - 1}")
        confusion = np.array(cells, np.int64).reshape(self._num_classes, self._num_classes)
        counted = int(confusion.sum())
        if not counted:
            rule = "at least one must have a class; check the values of the masks"
            raise DataError(f"validation masks: all of their {ignored} pixels are ignored: {rule}")
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        iou = np.full(len(union), np.nan)
        np.divide(100.0 * right, union, out=iou, where=union > 0)
        return PixelScores(float(np.nanmean(iou)), 100 * int(right.sum()) / counted, iou, confusion)
