"""Images with the truth and the prediction beside each: the worst, the middle and the best of a data set. No torch.

A task paints them over the image in its own way: classes of pixels by paint_classes() here, boxes by boxes.paint_boxes().
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

EACH = 6
"""Images of each kind, at most."""
_WIDTH, _GAP, _QUALITY = 720, 6, 85
"""Pixels of a strip of square pictures and between two of them, and their JPEG quality: about 30 KB a strip."""

Color = tuple[int, int, int]


class Example(NamedTuple):
    """The pictures of an image."""

    name: str
    told: str
    """Its score."""
    pictures: tuple[Image.Image, ...]
    """The image, the truth painted over it, the prediction painted over it, all of one size; a task may leave out the first."""


def colors(count: int) -> list[Color]:
    """A colour for each of `count` classes, 0 to 255: hues a golden ratio apart, in three depths."""
    depths = ((0.9, 0.95), (0.55, 0.8), (0.75, 0.5))
    found = [colorsys.hsv_to_rgb(k * 0.618034 % 1, *depths[k % 3]) for k in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in found]


def masked(classes: NDArray[np.uint8], palette: Sequence[Color]) -> Image.Image:
    """A palette image whose values are `classes` (H, W); those above the palette are black."""
    from PIL import Image

    mask = Image.fromarray(classes).convert("P")
    mask.putpalette([value for color in palette for value in color] + [0] * 3 * (256 - len(palette)))
    return mask


def paint_classes(image: Image.Image, classes: NDArray[np.uint8], palette: Sequence[Color]) -> Image.Image:
    """`image`, RGB, at half its colours, and half those of the class of each pixel (H, W)."""
    from PIL import Image

    return Image.blend(image, masked(classes, palette).convert("RGB"), 0.5)


def pick(scores: NDArray[np.float64]) -> dict[str, list[int]]:
    """Places in `scores` (N,) by kind: EACH of the lowest, the middle and the highest, a third of fewer than 18; NaN is none.

    The lowest come first; equal scores keep their order. No place is in two kinds.
    """
    order = [int(place) for place in scores.argsort(kind="stable") if scores[place] == scores[place]]
    count, each = len(order), min(EACH, max(1, len(order) // 3))
    kinds = {
        "The worst": order[:each],
        "In the middle": order[(count - each) // 2 : (count + each) // 2],
        "The best": order[count - each :],
    }
    taken: set[int] = set()
    found: dict[str, list[int]] = {}
    for kind, places in kinds.items():
        found[kind] = [place for place in places if place not in taken]
        taken.update(places)
    return {kind: places for kind, places in found.items() if places}


def small(image: Image.Image, pictures: int) -> Image.Image:
    """`image` at the size of one of so many pictures of a strip; never enlarged."""
    scale = min(1.0, _WIDTH / pictures / max(image.size))
    return image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))


def strip(example: Example) -> str:
    """A data URI of its pictures side by side, on white."""
    from PIL import Image

    from fasttricks.reporting.charts import data_uri

    width, height = example.pictures[0].size
    count = len(example.pictures)
    canvas = Image.new("RGB", (count * width + (count - 1) * _GAP, height), (255, 255, 255))
    for number, picture in enumerate(example.pictures):
        canvas.paste(picture, (number * (width + _GAP), 0))
    return data_uri(canvas, "JPEG", quality=_QUALITY)
