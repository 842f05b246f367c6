"""The part of an image and of its mask that the network sees, by torchvision.transforms.v2.functional.

Training, as the authors' code has it (gluon-cv, data/segbase.py): a side is scaled to base_size times a random factor. A square
is cut out at a random place, blurred and mirrored, each with a probability. Where the image is smaller, it is filled up on the
right and below, with the mean colour, and with IGNORED in the mask. Theirs is filled with black and with value 0. It scales the
long side since September 2018; before that the short side, as torchvision does, and it turned the image by up to 10 degrees.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from fasttricks.config import DataConfig, SegmentConfig
from fasttricks.data.annotated.pixels import resize, short_side_to
from fasttricks.data.masks.source import IGNORED
from fasttricks.data.pipeline.draws import image_draws

_BLUR_PIXELS = 7  # three deviations of the widest blur
_LEAST_BLUR = 0.01  # narrower changes no pixel, and 0 is refused


class View(NamedTuple):
    """The part of an image that training shows once."""

    height: int
    """Height and width of the whole image after its resize, pixels."""
    width: int
    top: int
    """Where the square begins in it, from above and from the left."""
    left: int
    blur: float
    """Deviation of the Gaussian blur, pixels; 0: none."""
    flip: bool


def long_side_to(side: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) with the long side at `side`, the short one in proportion, rounded to the nearest, as in gluon-cv."""
    if height > width:
        return side, max(1, int(side * width / height + 0.5))
    return max(1, int(side * height / width + 0.5)), side


def draw_view(
    size: tuple[int, int], data: DataConfig, segment: SegmentConfig, *, seed: int, epoch: int, place: int
) -> View:
    """The view in `epoch` of an image of that (height, width). A pure function of its arguments.

    The side of segment.base_side is a whole number, uniform from scale[0] to scale[1] times base_size, both included.
    """
    draws = image_draws(seed, epoch, np.array([place]))
    low, high = (int(segment.base_size * factor) for factor in segment.scale)
    side = max(1, low + int(float(draws.area[0]) * (high - low + 1)))
    height, width = (short_side_to if segment.base_side == "short" else long_side_to)(side, *size)
    spare = np.maximum(0, np.array([height, width]) - data.image_size)
    top, left = (draws.position[0] * (spare + 1)).astype(np.int64).tolist()
    blurred = float(draws.factors[0, 0]) < segment.blur
    return View(height, width, top, left, float(draws.factors[0, 1]) * blurred, float(draws.flip[0]) < data.flip)


def show(image: NDArray[np.uint8], mask: NDArray[np.uint8], view: View, data: DataConfig) -> tuple[Tensor, Tensor]:
    """uint8 (S, S, 3) and (S, S): that view of an image (H, W, 3) and its mask (H, W), of side S = data.image_size."""
    side = data.image_size
    pixels, classes = resize(image, (view.height, view.width), data), _resize_mask(mask, (view.height, view.width))
    height, width = min(side, view.height - view.top), min(side, view.width - view.left)
    pixels, classes = (functional.crop(one, view.top, view.left, height, width) for one in (pixels, classes))
    if view.blur:
        pixels = functional.gaussian_blur(pixels, [_BLUR_PIXELS] * 2, [max(view.blur, _LEAST_BLUR)] * 2)
    if view.flip:
        pixels, classes = functional.horizontal_flip(pixels), functional.horizontal_flip(classes)
    if (height, width) != (side, side):
        margins = [0, 0, side - width, side - height]
        pixels = functional.pad(pixels, margins, fill=[float(round(mean)) for mean in data.mean])
        classes = functional.pad(classes, margins, fill=IGNORED)
    return pixels.permute(1, 2, 0).contiguous(), classes[0].contiguous()


def show_whole(image: NDArray[np.uint8], data: DataConfig) -> Tensor:
    """uint8 (h, w, 3): the whole image (H, W, 3) with the short side at data.val_resize."""
    return resize(image, short_side_to(data.val_resize, *image.shape[:2]), data).permute(1, 2, 0).contiguous()


def _resize_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """uint8 (1, h, w): the pixel nearest to each centre, as Pillow has it.

    Not as a tv_tensors.Mask: some releases of torchvision resize those by NEAREST, up to half a pixel off, whatever is asked.
    """
    resized: Tensor = functional.resize(torch.from_numpy(mask)[None], list(size), InterpolationMode.NEAREST_EXACT)
    return resized
