"""Images a second of the training input pipeline, beside torchvision's, timm's and the decoder alone, on a folder of JPEGs.

All read, decode, crop at random, resize to 224 pixels with PIL's bilinear filter, widened where the image shrinks (antialias),
flip, colour and normalise to float32, with as many workers or threads as there are cores. torchvision jitters brightness,
saturation and hue as the paper does; timm brightness, contrast and saturation, its own default. Neither has the PCA noise that
ours adds. The last contestant is the floor: DALI's decoder on the regions of such crops, and nothing after it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fasttricks.config import DataConfig, Operators
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import Source
from fasttricks.data.sources.folder import ImageFolder, scan_folder

BATCH_SIZE, IMAGE_SIZE, SKIPPED = 64, 224, 4
"""The first batches of a pass are not counted: they may have been prepared ahead."""
PASS = 1024
"""Images of a pass at least: a smaller folder is taken several times over, so that no loader is timed as it runs dry."""
FLOOR = "region decode alone"
THREADS, HW_DECODER_LOADS = (4, 8, 16), (0.0, 0.65, 0.9, 1.0)
"""Host threads of the GPU's pipeline, and the share of a batch for the JPEG engine (0: --deterministic on; 0.65: DALI's own)."""


def contestants(root: Path, workers: int) -> dict[str, Callable[[], float]]:
    """Name -> one pass over the images of `root`, a folder of class folders, returning images a second."""
    folder = scan_folder(root)
    times = -(-PASS // len(folder))
    folder = dataclasses.replace(folder, files=folder.files * times, labels=folder.labels * times)
    return {
        "fasttricks, paper's colour": one_pass(fasttricks(folder, workers)),
        "the same with DALI's operators": one_pass(fasttricks(folder, workers, "dali")),
        "torchvision, same colour": one_pass(torchvision(root, workers, times)),
        "timm, its colour": one_pass(_timm(root, workers, times)),
        FLOOR: one_pass(Decoder(folder, workers)),
    }


def one_pass(loader: Iterable[Any]) -> Callable[[], float]:
    """A pass over the batches of `loader`, returning images a second."""

    def measure() -> float:
        counted, start = 0, 0.0
        for index, batch in enumerate(loader):
            counted += count_images(batch) if index >= SKIPPED else 0
            if index == SKIPPED - 1:
                start = time.perf_counter()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        time.sleep(0.3)  # let threads that work ahead come to rest before the next contestant
        return counted / seconds

    return measure


def count_images(batch: Any) -> int:
    """Images of a batch of any contestant: ours, or a pair of images and labels."""
    return len(batch) if isinstance(batch, Batch) else len(batch[1])


def on_device(
    folder: ImageFolder,
    device: torch.device,
    *,
    batch_size: int = 128,
    image_size: int = IMAGE_SIZE,
    images: int = 4096,
) -> dict[str, Callable[[], float]]:
    """Name -> one pass of the training input in FP16 on `device`, by THREADS and HW_DECODER_LOADS, returning images a second.

    A pass takes about so many images. Its loader, and the device's memory that the decoders hold, ends with it.
    """
    times = -(-images // len(folder))
    folder = dataclasses.replace(folder, files=folder.files * times, labels=folder.labels * times)

    def measure(threads: int, load: float) -> float:
        config = DataConfig(image_size=image_size, val_resize=image_size, threads=threads)
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "dtype": torch.float16}
        return one_pass(Loader(folder, config, training=True, hw_decoder_load=load, **options))()

    return {
        f"{threads} threads, hw_decoder_load {load:g}": partial(measure, threads, load)
        for threads in THREADS
        for load in HW_DECODER_LOADS
    }


def fasttricks(images: Source, workers: int, operators: Operators = "auto") -> Iterable[Any]:
    """The training input of the project on the CPU, the paper's augmentation."""
    config = DataConfig(image_size=IMAGE_SIZE, threads=workers, operators=operators)
    return Loader(images, config, training=True, batch_size=BATCH_SIZE, device=torch.device("cpu"))


class Decoder:
    """DALI's own reader and random crop; of each region an 8 x 8 corner is kept, so that nothing but decoding takes time."""

    def __init__(self, folder: ImageFolder, workers: int) -> None:
        from nvidia.dali import fn, pipeline_def

        def graph() -> Any:
            files, labels = list(folder.files), list(folder.labels)
            encoded, labels = fn.readers.file(
                file_root=str(folder.root), files=files, labels=labels, random_shuffle=True, initial_fill=BATCH_SIZE
            )
            config = DataConfig()
            images = fn.decoders.image_random_crop(
                encoded, random_aspect_ratio=list(config.aspect), random_area=list(config.area), num_attempts=100
            )
            return fn.slice(images, (0, 0), (8, 8), axes=(0, 1), out_of_bounds_policy="pad"), labels

        self._batches = len(folder) // BATCH_SIZE
        self._pipeline = pipeline_def(graph)(batch_size=BATCH_SIZE, num_threads=workers, device_id=None, seed=1)
        self._pipeline.build()

    def __iter__(self) -> Iterator[Any]:
        return (self._pipeline.run() for _ in range(self._batches))


def torchvision(root: Path, workers: int, times: int) -> Iterable[Any]:
    """ImageFolder, v2 transforms and DataLoader, over the images so many times."""
    from torchvision.datasets import ImageFolder as Images
    from torchvision.transforms import InterpolationMode, v2

    steps = [
        v2.RandomResizedCrop(IMAGE_SIZE, interpolation=InterpolationMode.BILINEAR, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=0.4, saturation=0.4, hue=0.2),  # 0.2 of a turn: the paper's 72 degrees
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    images = torch.utils.data.ConcatDataset([Images(str(root), v2.Compose(steps))] * times)
    return torch.utils.data.DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=True)


def _timm(root: Path, workers: int, times: int) -> Iterable[Any]:
    from timm.data import create_dataset, create_loader

    images = create_dataset("", root=str(root))
    images.reader.samples = images.reader.samples * times
    return create_loader(
        images,
        (3, IMAGE_SIZE, IMAGE_SIZE),
        BATCH_SIZE,
        is_training=True,
        interpolation="bilinear",
        num_workers=workers,
        device=torch.device("cpu"),
        use_prefetcher=False,
        persistent_workers=True,
        hflip=0.5,
        color_jitter=0.4,
    )
