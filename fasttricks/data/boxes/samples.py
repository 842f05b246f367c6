"""An image and its boxes as a batch takes them: a pure function of (seed, epoch, place), computed in any process."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.config import DataConfig, DetectConfig
from fasttricks.data.annotated.samples import Samples, Turn
from fasttricks.data.boxes.source import Boxes, BoxSource
from fasttricks.data.boxes.views import draw_flip, show
from fasttricks.data.sources.decode import BadImage, decode
from fasttricks.data.sources.errors import why_unreadable


class Shown(NamedTuple):
    """An image's part of a batch."""

    image: NDArray[np.uint8]
    """(h, w, 3)"""
    boxes: Boxes
    """In its pixels."""
    size: tuple[int, int]
    """Height and width of the file's image, upright."""


class BoxSamples(Samples[Shown]):
    """training: mirrored or not."""

    def __init__(
        self, source: BoxSource, config: DataConfig, detect: DetectConfig, *, training: bool, seed: int
    ) -> None:
        super().__init__(source, training=training, seed=seed)
        self._boxes, self._config, self._detect = source, config, detect

    def make(self, image: int, turn: Turn) -> Shown:
        """As Samples.make."""
        pixels, boxes = read_boxed(self._boxes, image, self._config.max_pixels)
        flip = self._training and draw_flip(self._config, seed=self._seed, epoch=turn.epoch, place=turn.place)
        shown, xyxy = show(pixels, boxes.xyxy, flip, self._config, self._detect)
        kept = Boxes(xyxy.numpy(), boxes.labels, boxes.difficult)
        return Shown(shown.numpy(), kept, (pixels.shape[0], pixels.shape[1]))


def read_boxed(source: BoxSource, index: int, max_pixels: int) -> tuple[NDArray[np.uint8], Boxes]:
    """(pixels (H, W, 3), upright, as Pillow's convert("RGB") has them, objects) of image `index`, which is not in source.bad.

    Raises BadImage, with the reason to follow the image's name: it cannot be read or decoded, is over max_pixels, or its
    annotation says another size. Cost: Pillow's decoding, single-threaded.
    """
    try:
        pixels = np.array(decode(source.read(index), max_pixels).convert("RGB"))
    except OSError as error:
        raise BadImage(why_unreadable(error)) from error
    (height, width), (rows, columns) = source.sizes[index].tolist(), pixels.shape[:2]
    if (height, width) != (rows, columns):
        turned = "; its EXIF turns it" if (height, width) == (columns, rows) else ""
        raise BadImage(f"annotation of {width} x {height} pixels, image of {columns} x {rows}{turned}")
    return pixels, source.boxes(index)
