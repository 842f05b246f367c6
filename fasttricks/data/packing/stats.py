"""Mean, deviation and sizes of images, for `fasttricks data stats`. No torch, no DALI."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.data.packing.pool import stopping, worker_pool
from fasttricks.data.sources import Source
from fasttricks.data.sources.decode import BadImage, decode, quiet_pillow
from fasttricks.data.sources.errors import DataError, why_unreadable
from fasttricks.data.sources.listed import Where, read_at

_CHUNK = 32  # images a task: a tenth of a second


class _Image(NamedTuple):
    mean: tuple[float, ...]
    square: tuple[float, ...]
    """Mean of the squares, R, G and B."""
    width: int
    height: int


class Stats(NamedTuple):
    """The statistics of the images of a split."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """R, G and B, 0 to 255; every image counts alike."""
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    """(N,), pixels, of the images that were measured, upright."""
    bad: dict[int, str]
    """Images that could not be measured, by number, and why; those that the source knows as bad too."""


def draw_images(count: int, images: int) -> list[int]:
    """`images` of the numbers below `count`, in order, drawn by a fixed seed; all where that is 0 or more than there are."""
    if not images or images >= count:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, images, replace=False).tolist())


def measure(
    source: Source, images: Sequence[int], *, workers: int, max_pixels: int, advance: Callable[[int], object]
) -> Stats:
    """The statistics of `images`, by number, of `source`.

    Each channel's mean is the mean over images of the image's mean; the deviation is the root of the mean of its mean square,
    less the square of that mean. The pixels are those that training crops. A sum of an image is exact, and sums over images
    are rounded once, so neither order nor `workers`, processes of which there are 1 or more, change a bit.
    Raises DataError where no image is good, and where one ends the process that decodes it. Cost: every image is decoded.
    """
    bad = {image: source.bad[image] for image in images if image in source.bad}
    good = [image for image in images if image not in bad]
    found: list[_Image] = []
    with worker_pool(workers) as pool:
        parts = [good[at : at + _CHUNK] for at in range(0, len(good), _CHUNK)]
        tasks = [pool.submit(_measure, [source.locate(image) for image in part], max_pixels) for part in parts]
        for part, task in zip(parts, tasks, strict=True):
            try:
                measured = task.result()
            except BrokenProcessPool as error:
                rule = "a process that decodes its images died; find the image by `fasttricks data scan`"
                raise DataError(f"{source.root}: {rule}") from error
            found += [image for image in measured if not isinstance(image, str)]
            bad |= {number: why for number, why in zip(part, measured, strict=True) if isinstance(why, str)}
            advance(len(part))
    if not found:
        raise DataError(f"{source.root}: none of {len(images)} images is good; {next(iter(bad.values()))}")
    mean = [math.fsum(image.mean[channel] for image in found) / len(found) for channel in range(3)]
    square = [math.fsum(image.square[channel] for image in found) / len(found) for channel in range(3)]
    std = [math.sqrt(max(0.0, s - m * m)) for m, s in zip(mean, square, strict=True)]
    sides = np.array([(image.width, image.height) for image in found])
    return Stats(tuple(mean), tuple(std), sides[:, 0], sides[:, 1], dict(sorted(bad.items())))


def _measure(places: list[Where], max_pixels: int) -> list[_Image | str]:
    """Each of the images, or why it is bad. In a process of its own."""
    quiet_pillow()
    return [_measure_one(place, max_pixels) for place in places if not stopping()]


def _measure_one(place: Where, max_pixels: int) -> _Image | str:
    try:
        image = decode(read_at(place), max_pixels)
    except OSError as error:
        return why_unreadable(error)
    except BadImage as error:
        return str(error)
    counts = np.array(image.histogram(), np.int64).reshape(-1, 256)  # of one channel or three
    pixels, values = image.width * image.height, np.arange(256)
    mean, square = counts @ values / pixels, counts @ values**2 / pixels
    channels = np.zeros(3, np.int64) if len(counts) == 1 else np.arange(3)
    return _Image(tuple(mean[channels].tolist()), tuple(square[channels].tolist()), image.width, image.height)
