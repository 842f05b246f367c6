"""An image and its mask as a batch takes them: a pure function of (seed, epoch, place), computed in any process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.config import DataConfig, SegmentConfig
from fasttricks.data.annotated.samples import Samples, Turn
from fasttricks.data.masks.pixels import Pair, read_pair
from fasttricks.data.masks.source import MaskSource
from fasttricks.data.masks.views import draw_view, show, show_whole


class Shown(NamedTuple):
    """An image's part of a batch; or, each with another dimension in front, a batch."""

    image: NDArray[np.uint8]
    """(h, w, 3)"""
    mask: NDArray[np.uint8]
    """(H, W)"""
    classes: NDArray[np.bool_]
    """(K,): whether the whole mask has a pixel of each class; also in a batch."""


class MaskSamples(Samples[Shown]):
    """training: a random view of the image. Else the whole image."""

    def __init__(
        self, source: MaskSource, config: DataConfig, segment: SegmentConfig, *, training: bool, seed: int
    ) -> None:
        super().__init__(source, training=training, seed=seed)
        self._masks, self._config, self._segment = source, config, segment

    def make(self, image: int, turn: Turn) -> Shown:
        """As Samples.make."""
        pair = read_pair(self._masks, image, self._config.max_pixels)
        return Shown(*self._shown(pair, turn), pair.counts > 0)

    def _shown(self, pair: Pair, turn: Turn) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if not self._training:
            return show_whole(pair.image, self._config).numpy(), pair.mask
        size = (pair.mask.shape[0], pair.mask.shape[1])
        view = draw_view(size, self._config, self._segment, seed=self._seed, epoch=turn.epoch, place=turn.place)
        pixels, classes = show(pair.image, pair.mask, view, self._config)
        return pixels.numpy(), classes.numpy()


def join(parts: list[Shown]) -> Shown | None:
    """A batch of parts, whose images have one size, as their masks; None where there is none."""
    if not parts:
        return None
    images, masks, classes = (np.stack(column) for column in zip(*parts, strict=True))
    return Shown(images, masks, np.asarray(classes.any(0)))
