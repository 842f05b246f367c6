"""The teacher's logits on disk, so that it runs once an image and not once an image and epoch.

That takes images that are the same in every epoch: data.fixed_augmentation, and neither mixup nor growing sizes. A file
holds a row an image; a row counts only if its checksum does, so neither kills nor ranks and runs that write at once can do
harm, and runs share a cache. Only its making is for one at a time.
An image that is replaced under its name is not noticed: take another folder then.
"""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttricks.config import ConfigError, TrainConfig, require
from fasttricks.data.batch import Batch
from fasttricks.data.sources import Source
from fasttricks.learning.teacher import Teacher
from fasttricks.runs.folder import config_digest
from fasttricks.system.ownership import Claim
from fasttricks.system.transfer import to_device

_NUMPY = {torch.float16: np.float16, torch.float32: np.float32}


class CachedTeacher:
    """`teacher`, asked only for batches of which it has not seen every image.

    Give it the images as the loader made them. Costs per batch whose rows are all there: reading them, and one copy to the
    device, without a sync. Else a pass of the teacher and, to write its logits, a sync: in the first epoch.

    Raises ConfigError where the file cannot be made, also without room.
    """

    def __init__(self, teacher: Teacher, file: Path, *, num_images: int, num_classes: int) -> None:
        self.teacher = teacher
        kind = np.dtype([("image", "<i8"), ("crc", "<u4"), ("logits", _NUMPY[teacher.dtype], num_classes)])
        size = num_images * kind.itemsize
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # where the file system lacks fallocate, glibc writes a zero where it has read one: into another's new row
            with Claim(file.with_name(f".{file.name}.lock"), patience_s=math.inf):
                _allocate(file, size)
            self._rows: NDArray[Any] = np.memmap(file, kind, "r+", shape=(num_images,))
        except OSError as error:
            rule = (
                f"must be a folder with room for {size / 1e6:,.0f} MB ({error}); give another, or leave the cache out"
            )
            raise ConfigError(f"distill.cache = {str(file.parent)!r}: {rule}") from error
        self.file = file
        self.asked = 0
        """Batches that the teacher was run for."""

    def judge(self, batch: Batch, images: Tensor) -> Tensor:
        """Logits (N, K), in the teacher's dtype, on the batch's device. `images` are those of `batch`: check_cache sees to it."""
        if batch.places is None or batch.shown is None:
            raise TypeError("a cache of the teacher's logits needs batches that name their images, as a Loader's do")
        rows = self._rows[batch.places]  # a copy
        if len(rows) and all(map(_holds, rows, batch.shown)):
            cached = torch.from_numpy(np.ascontiguousarray(rows["logits"]))
            return to_device(cached, batch.images.device)
        self.asked += 1
        logits: Tensor = self.teacher(batch.images)
        rows["image"], rows["logits"] = batch.shown + 1, logits.cpu().numpy()
        rows["crc"] = [_checksum(row) for row in rows]
        self._rows[batch.places] = rows
        return logits


def _allocate(file: Path, size: int) -> None:
    """Make `file` `size` bytes long where it is shorter: a hole that finds no room later would be a SIGBUS."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)


def _checksum(row: Any) -> int:
    return zlib.crc32(row["logits"].tobytes(), int(row["image"]) & 0xFFFFFFFF)


def _holds(row: Any, image: int) -> bool:
    """Whether `row` is the whole row of `image`; image numbers begin at 1 in a file, whose empty rows are zeros."""
    return bool(row["image"] == image + 1 and row["crc"] == _checksum(row))


def check_cache(config: TrainConfig) -> None:
    """Raise ConfigError where the config asks for a cache, but its images change from epoch to epoch."""
    if not config.distill.cache:
        return
    rule, cache = "needs images that are the same in every epoch; ", config.distill.cache
    require(config.data.fixed_augmentation, "distill.cache", cache, rule + "add --data.fixed-augmentation")
    require(
        config.loss.mixup_alpha == 0,
        "distill.cache",
        cache,
        rule + "mixup changes the blend in each epoch: add --tricks.off mixup",
    )
    again = "data.balance shows an image in several crops an epoch: leave it out, or take --loss.class-weights balanced"
    require(config.data.balance == 0, "distill.cache", cache, rule + again)
    grow = "progressive resizing makes them grow: add --tricks.off progressive_resizing"
    require(config.schedule.first_size == 1, "distill.cache", cache, rule + grow)


def open_cache(teacher: Teacher, config: TrainConfig, train_folder: Source, *, operators: str) -> CachedTeacher:
    """The cache in the folder config.distill.cache, in a file of its own for each teacher, data set, seed and augmentation.

    operators: which code makes the pixels. Raises ConfigError as CachedTeacher.
    """
    shown = TrainConfig(recipe="", epochs=6, global_batch_size=1, seed=config.seed, data=config.data)
    name = config_digest(shown, teacher=teacher.digest, files=train_folder.fingerprint(), operators=operators)
    file = Path(config.distill.cache) / f"{name}.{str(teacher.dtype)[6:]}"
    return CachedTeacher(teacher, file, num_images=len(train_folder), num_classes=len(train_folder.classes))
