"""The input pipeline written the slow plain way in PIL and numpy float64, one image and one step at a time: the oracle
of tests.

Nothing here is shared with pixels.py or color.py but the published constants: each colour step acts on pixels, in turn,
as the paper words it. An image's random numbers are handed in (draws.py). Images are (H, W, 3) arrays, RGB, 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fasttricks.config import DataConfig
from fasttricks.data.pipeline.color import PCA_VALUES, PCA_VECTORS, RGB_TO_YIQ
from fasttricks.data.pipeline.draws import Draws

Pixels = NDArray[np.float64]

MEAN, STD = (123.68, 116.779, 103.939), (58.393, 57.12, 57.375)  # section 2.1

_FILTERS = {
    "linear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
    "lanczos3": Image.Resampling.LANCZOS,
}


def decode(path: Path | str) -> Image.Image:
    """The image as RGB, turned upright by its EXIF tag."""
    with Image.open(path) as image:
        upright, deep = ImageOps.exif_transpose(image), image.format == "PPM" and image.mode == "I"
    if upright.mode.startswith("I;16") or deep:  # PIL would cut 65535 to 255
        return Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8)).convert("RGB")
    return upright.convert("RGBA").convert("RGB") if "transparency" in upright.info else upright.convert("RGB")


def validation_pixels(image: Image.Image, *, image_size: int, val_resize: int, interpolation: str = "linear") -> Pixels:
    """Short side resized to val_resize keeping the aspect ratio (sizes rounded to pixels), centre crop of image_size.

    config.antialias widens the filter when the image shrinks.
    """
    scale = val_resize / min(image.size)
    width, height = (math.floor(side * scale + 0.5) for side in image.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return _resize(image, (width, height), interpolation)[top : top + image_size, left : left + image_size]


def training_pixels(
    image: Image.Image,
    start: Sequence[float],
    extent: Sequence[float],
    *,
    flip: bool,
    image_size: int,
    interpolation: str = "linear",
) -> Pixels:
    """The window from `start` of size `extent`, both (y, x) relative to the image, resized to a square, mirrored if
    `flip`.

    At the rim a filter reaches past the window: DALI repeats the outermost pixels there, so that is done here; PIL
    alone would weigh the pixels that exist more, up to 15 grey levels apart in the outermost row or column.
    """
    sides = (image.height, image.width)
    top, left = (math.floor(s * side + 0.5) for s, side in zip(start, sides, strict=True))
    bottom, right = (math.floor((s + e) * side + 0.5) for s, e, side in zip(start, extent, sides, strict=True))
    cut = np.asarray(image.crop((left, top, right, bottom)))
    rim = 4 + 3 * math.ceil(max(cut.shape) / image_size)  # wider than any of the filters
    padded = Image.fromarray(np.pad(cut, ((rim, rim), (rim, rim), (0, 0)), mode="edge"))
    box = (rim, rim, rim + cut.shape[1], rim + cut.shape[0])
    resized = _resize(padded, (image_size, image_size), interpolation, box)
    return resized[:, ::-1] if flip else resized


def training_image(image: Image.Image, config: DataConfig, draws: Draws) -> Pixels:
    """(S, S, 3), normalised: the training input from `image` with its random numbers `draws`, N = 1."""
    low, high = config.aspect
    aspect = low + (high - low) * draws.aspect[0]
    start, extent = window(image.height, image.width, config.area, aspect, draws.area[0], draws.position[0])
    pixels = training_pixels(
        image,
        start,
        extent,
        flip=bool(draws.flip[0] < config.flip),
        image_size=config.image_size,
        interpolation=config.interpolation,
    )
    factors = 1 - config.color_jitter + 2 * config.color_jitter * draws.factors[0]
    factors = factors[:0] if config.color == "none" else factors
    colored = augment_color(pixels, config.color, factors, config.pca_noise * draws.noise[0], mean=config.mean)
    return normalise(colored, config.mean, config.std)


def _resize(
    image: Image.Image, size: tuple[int, int], interpolation: str, box: tuple[float, float, float, float] | None = None
) -> Pixels:
    """PIL's resize in floating point, rounded to 8 bits at the end. PIL on 8-bit images also rounds and cuts between
    rows and
    columns: a grey level apart for linear, up to 25 at hard edges for cubic and lanczos3, which overshoot.
    """
    channels = [
        np.asarray(channel.convert("F").resize(size, _FILTERS[interpolation], box=box), np.float64)
        for channel in image.split()
    ]
    return np.round(np.stack(channels, axis=-1)).clip(0, 255)


def window(
    height: int,
    width: int,
    area_range: Sequence[float],
    aspect: float,
    area_draw: float,
    position: Sequence[float] | Pixels,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(start, extent), (y, x), relative to the image, of the random crop of `aspect` = width / height in pixels.

    `area_draw` and `position` are uniform draws in [0, 1). The area is area_draw of the way from the low end of
    area_range to the largest area that fits at this aspect (or to the high end, if that is smaller).
    """
    # The crop of this aspect that fills the image touches two opposite sides.
    full_height = min(height, width / aspect)
    largest = min(full_height * full_height * aspect / (height * width), area_range[1])
    area = min(largest, area_range[0] + area_draw * (largest - area_range[0]))
    crop_height = math.sqrt(area * height * width / aspect)
    extent = (max(crop_height, 1) / height, max(crop_height * aspect, 1) / width)
    return (position[0] * (1 - extent[0]), position[1] * (1 - extent[1])), extent


def rotate_hue(pixels: Pixels, factor: float) -> Pixels:
    """I and Q of YIQ rotated by (factor - 1) * 180 degrees."""
    yiq = pixels @ RGB_TO_YIQ.T
    turn = np.exp(1j * math.pi * (factor - 1))
    chroma = (yiq[..., 1] + 1j * yiq[..., 2]) * turn
    return np.stack([yiq[..., 0], chroma.real, chroma.imag], axis=-1) @ np.linalg.inv(RGB_TO_YIQ).T


def scale_saturation(pixels: Pixels, factor: float) -> Pixels:
    """Blend with the luma 0.299 R + 0.587 G + 0.114 B."""
    luma = 0.299 * pixels[..., :1] + 0.587 * pixels[..., 1:2] + 0.114 * pixels[..., 2:]
    return factor * pixels + (1 - factor) * luma


def scale_brightness(pixels: Pixels, factor: float) -> Pixels:
    """Multiply."""
    return factor * pixels


def scale_contrast(pixels: Pixels, factor: float, mean: Sequence[float] = MEAN) -> Pixels:
    """Blend with the luma of `mean`."""
    return factor * pixels + (1 - factor) * float(RGB_TO_YIQ[0] @ np.asarray(mean))


def add_pca_noise(pixels: Pixels, draws: Sequence[float] | Pixels) -> Pixels:
    """Add sum_i draw_i * value_i * axis_i to every pixel (AlexNet, section 4.1)."""
    noise = np.zeros(3)
    for axis in range(3):
        noise += draws[axis] * PCA_VALUES[axis] * PCA_VECTORS[:, axis]
    return pixels + noise


def normalise(pixels: Pixels, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Pixels:
    """(x - mean) / std for R, G, B; (3,) each, 0 to 255, and by default the paper's."""
    normal: Pixels = (pixels - np.asarray(mean)) / np.asarray(std)
    return normal


def augment_color(
    pixels: Pixels,
    color: str,
    factors: Sequence[float] | Pixels,
    noise: Sequence[float] | Pixels,
    *,
    clip: bool = False,
    mean: Sequence[float] = MEAN,
) -> Pixels:
    """All colour steps in their order, not yet normalised; `factors` in the order of the steps.

    `clip` cuts to 0..255 after each step, as code that works on 8-bit images would: how far that is from the pipeline
    is measured by tests/test_data_color.py. mean: that of the data set.
    """
    table: dict[str, tuple[Callable[[Pixels, float], Pixels], ...]] = {
        "paper": (rotate_hue, scale_saturation, scale_brightness),
        "published": (scale_brightness, partial(scale_contrast, mean=mean), scale_saturation),
        "none": (),
    }
    for step, factor in zip(table[color], factors, strict=True):
        pixels = step(pixels, factor)
        if clip:
            pixels = pixels.clip(0, 255)
    pixels = add_pca_noise(pixels, noise)
    return np.clip(pixels, 0, 255) if clip else pixels
