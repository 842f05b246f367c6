"""The BoxLoader: an epoch's images and boxes, decoded and transformed by worker processes; bad files and boxes named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fasttricks.config import DataConfig, DetectConfig
from fasttricks.data.annotated.loader import AnnotatedLoader, LoaderOptions
from fasttricks.data.annotated.pixels import normalise
from fasttricks.data.annotated.samples import Drawn
from fasttricks.data.boxes.batch import BoxBatch
from fasttricks.data.boxes.samples import BoxSamples, Shown
from fasttricks.data.boxes.source import BoxSource
from fasttricks.data.sources.bad import name_bad
from fasttricks.system.transfer import to_device

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BoxLoader(AnnotatedLoader[Shown, list[Shown], BoxBatch]):
    """Batches of images and boxes.

    Each image is whole, its short side at detect.base_size, its long side at detect.max_size at most; in training it is mirrored
    with the probability data.flip. Validation has one image a batch, as a detector pads images to a common size, and features
    at the edge would depend on the others.
    Boxes that are left out or end at the image's edge are named on stderr before the first batch, and listed in `bad`.
    Arguments and all else as AnnotatedLoader, which reads flip of `config` too here. detect: base_size, max_size.
    """

    def __init__(
        self, source: BoxSource, config: DataConfig, detect: DetectConfig, **options: Unpack[LoaderOptions]
    ) -> None:
        super().__init__(source, config, **options)
        self._boxes, self._detect = source, detect

    @property
    def bad(self) -> dict[str, str]:
        """The bad images that this rank knows of, lines of a list that name an image again, and odd boxes, by name, and why."""
        clamped = {name: f"{why}; it ends at the edge" for name, why in self._boxes.clamped.items()}
        return {**super().bad, **self._boxes.left_out, **clamped}

    def _samples(self) -> BoxSamples:
        return BoxSamples(self._boxes, self._config, self._detect, training=self._training, seed=self._seed)

    @staticmethod
    def _join(parts: list[Shown]) -> list[Shown]:
        return parts

    def _batch(self, drawn: Drawn[list[Shown]]) -> BoxBatch:
        parts = drawn.content
        images = [to_device(torch.from_numpy(part.image), self._device) for part in parts]
        return BoxBatch(
            images=[normalise(image[None], self._config, self._dtype)[0] for image in images],
            boxes=self._split([torch.from_numpy(part.boxes.xyxy) for part in parts]),
            labels=self._split([torch.from_numpy(part.boxes.labels) for part in parts]),
            difficult=self._split([torch.from_numpy(part.boxes.difficult) for part in parts]),
            sizes=np.array([part.size for part in parts], np.int64).reshape(-1, 2),
            places=drawn.places,
            shown=drawn.shown,
        )

    def _split(self, parts: list[Tensor]) -> list[Tensor]:
        """The same on the device, by one copy."""
        return list(torch.split(to_device(torch.cat(parts), self._device), list(map(len, parts)))) if parts else []

    def _name_strays(self) -> None:
        super()._name_strays()
        name_bad(list(self._boxes.left_out.items()), "left out", kind="box")
        name_bad(list(self._boxes.clamped.items()), "it ends at the edge", kind="box")
