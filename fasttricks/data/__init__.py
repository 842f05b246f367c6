"""Input pipeline: folders of images in, normalised channels-last batches on the device out.

`scan_dataset` (no torch, no DALI) finds and checks the files, `Loader` (DALI) decodes and augments them. `Loader` is imported at
first use, so that scanning a folder needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fasttricks.data.folder import DataError, ImageFolder, scan_dataset, scan_folder

if TYPE_CHECKING:
    from torch import Tensor

    from fasttricks.data.dali import Loader

__all__ = ["Batch", "DataError", "ImageFolder", "Loader", "scan_dataset", "scan_folder"]


class Batch(NamedTuple):
    """N images and their labels on the device. N may be smaller at the end of an epoch, and 0."""

    images: Tensor
    """(N, 3, S, S), channels-last in memory, normalised, in the dtype asked for."""
    labels: Tensor
    """(N,) int64, 0 to number of classes - 1."""


def __getattr__(name: str) -> Any:
    if name != "Loader":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fasttricks.data.dali import Loader

    return Loader
