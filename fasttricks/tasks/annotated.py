"""The arguments of the loaders of images with masks and with boxes, which the tasks of both share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fasttricks.config import TrainConfig
from fasttricks.learning.precision import image_dtype
from fasttricks.system.distributed import World

if TYPE_CHECKING:
    from fasttricks.data.annotated.loader import LoaderOptions  # torchvision, which networks and losses can do without


def training_options(config: TrainConfig, world: World) -> LoaderOptions:
    """This rank's part of the training images, in the dtype of the precision."""
    return {
        "training": True,
        "batch_size": config.micro_batch_size(world.size),
        "device": world.device,
        "dtype": image_dtype(config.precision, world.device),
        "seed": config.seed,
        "rank": world.rank,
        "world_size": world.size,
    }


def validation_options(world: World, dtype: torch.dtype) -> LoaderOptions:
    """This rank's part of the validation images, one a batch."""
    return {
        "training": False,
        "batch_size": 1,
        "device": world.device,
        "dtype": dtype,
        "rank": world.rank,
        "world_size": world.size,
    }
