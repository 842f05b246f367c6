"""Images with the truth and the prediction beside each: the worst, the middle and the best of a data set. No torch.

A task paints `truth` and `found` over the image in its own way: classes of pixels by paint_classes() here.
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
_SIDE, _GAP, _QUALITY = 240, 6, 85
"""Pixels of a picture's longer side and between two pictures, and their JPEG quality: about 30 KB of the three."""

Color = tuple[int, int, int]


class Example(NamedTuple):
    """An image, and the two pictures of it."""

    name: str
    told: str
    """Its score."""
    image: Image.Image
    truth: Image.Image
    """The truth painted over the image, of the same size as it; so is `found`."""
    found: Image.Image


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


def small(example: Example) -> Example:
    """`example` with pictures of at most _SIDE pixels."""
    scale = min(1.0, _SIDE / max(example.image.size))
    size = (max(1, round(scale * example.image.width)), max(1, round(scale * example.image.height)))
    return example._replace(
        image=example.image.resize(size), truth=example.truth.resize(size), found=example.found.resize(size)
    )


def strip(example: Example) -> str:
    """A data URI of image, truth and prediction side by side, on white."""
    from PIL import Image

    from fasttricks.reporting.charts import data_uri

    width, height = example.image.size
    canvas = Image.new("RGB", (3 * width + 2 * _GAP, height), (255, 255, 255))
    for number, picture in enumerate((example.image, example.truth, example.found)):
        canvas.paste(picture, (number * (width + _GAP), 0))
    return data_uri(canvas, "JPEG", quality=_QUALITY)
