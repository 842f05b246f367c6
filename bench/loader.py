"""Images a second of the training input pipeline, beside torchvision's and timm's, on a folder of JPEGs.

All decode, crop at random, resize with antialias, flip, colour and normalise to float32 at 224 pixels, with as many workers or
threads as there are cores. torchvision jitters brightness, saturation and hue as the paper does; timm brightness, contrast and
saturation, its own default. Neither has the PCA noise that ours adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fasttricks.config import DataConfig
from fasttricks.data import Loader, scan_folder

BATCH_SIZE, IMAGE_SIZE, SKIPPED = 64, 224, 4
"""The first batches of a pass are not counted: they may have been prepared ahead."""


def contestants(root: Path, workers: int) -> dict[str, Callable[[], float]]:
    """Name -> one pass over the images of `root`, a folder of class folders, returning images a second."""
    makers = {
        "fasttricks, paper's colour": _fasttricks,
        "torchvision, same colour": _torchvision,
        "timm, its colour": _timm,
    }
    return {name: _one_pass(make(root, workers)) for name, make in makers.items()}


def _one_pass(loader: Iterable[Any]) -> Callable[[], float]:
    def measure() -> float:
        counted, start = 0, 0.0
        for index, (images, _) in enumerate(loader):
            counted += len(images) if index >= SKIPPED else 0
            if index == SKIPPED - 1:
                start = time.perf_counter()
        seconds = time.perf_counter() - start
        time.sleep(0.3)  # let what works ahead come to rest before the next contestant's turn
        return counted / seconds

    return measure


def _fasttricks(root: Path, workers: int) -> Iterable[Any]:
    config = DataConfig(image_size=IMAGE_SIZE, threads=workers)
    return Loader(scan_folder(root), config, training=True, batch_size=BATCH_SIZE, device=torch.device("cpu"))


def _torchvision(root: Path, workers: int) -> Iterable[Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(IMAGE_SIZE),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.4, saturation=0.4, hue=0.2),  # 0.2 of a turn: the paper's 72 degrees
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    images = ImageFolder(str(root), v2.Compose(steps))
    return torch.utils.data.DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=True)


def _timm(root: Path, workers: int) -> Iterable[Any]:
    from timm.data import create_dataset, create_loader

    return create_loader(
        create_dataset("", root=str(root)),
        (3, IMAGE_SIZE, IMAGE_SIZE),
        BATCH_SIZE,
        is_training=True,
        num_workers=workers,
        device=torch.device("cpu"),
        use_prefetcher=False,
        persistent_workers=True,
        hflip=0.5,
        color_jitter=0.4,
    )
