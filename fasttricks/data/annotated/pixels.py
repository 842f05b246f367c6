"""Resize and normalisation of single images, by torchvision.transforms.v2.functional."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from fasttricks.config import DataConfig

_FILTERS = {"linear": InterpolationMode.BILINEAR, "cubic": InterpolationMode.BICUBIC}
INTERPOLATIONS = tuple(_FILTERS)
"""The values of data.interpolation that torchvision has for tensors."""


def short_side_to(side: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) with the short side at `side`, the long one in proportion, rounded down, as in gluon-cv and torchvision."""
    if height < width:
        return side, max(side, int(side * width / height))
    return max(side, int(side * height / width)), side


def normalise(images: Tensor, data: DataConfig, dtype: torch.dtype) -> Tensor:
    """(N, 3, H, W) in `dtype`, channels-last in memory, less data.mean and divided by data.std, of uint8 (N, H, W, 3).

    In float32, and rounded to `dtype` once.
    """
    exact: Tensor = functional.normalize(images.permute(0, 3, 1, 2).float(), list(data.mean), list(data.std))
    return exact.to(dtype)


def resize(image: NDArray[np.uint8], size: tuple[int, int], data: DataConfig) -> Tensor:
    """uint8 (3, h, w)."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    resized: Tensor = functional.resize(tensor, list(size), _FILTERS[data.interpolation], antialias=data.antialias)
    return resized
