"""The pixels of an image and of its mask, by Pillow. No torch."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.data.masks.places import why_no_mask_header
from fasttricks.data.masks.source import IGNORED, MaskSource
from fasttricks.data.sources.decode import BadImage, check_size, damaged, decode
from fasttricks.data.sources.errors import why_unreadable
from fasttricks.data.sources.jpeg import orientation


class Pair(NamedTuple):
    """An image and its mask, of one size."""

    image: NDArray[np.uint8]
    """(H, W, 3), RGB."""
    mask: NDArray[np.uint8]
    """(H, W): classes, or IGNORED."""
    counts: NDArray[np.int64]
    """(K,): pixels of each class."""


def read_pair(source: MaskSource, index: int, max_pixels: int) -> Pair:
    """The pixels of image `index`, upright, as Pillow's convert("RGB") has them, and of its mask.

    Raises BadImage, with the reason to follow the image's name: it or its mask cannot be read or decoded, is over max_pixels,
    or they differ in size, or the mask has a value that is no class. Cost: Pillow's decoding of both, single-threaded.
    """
    try:
        image = np.array(decode(source.read(index), max_pixels).convert("RGB"))
    except OSError as error:
        raise BadImage(why_unreadable(error)) from error
    try:
        mask, counts = decode_mask(source.read_mask(index), len(source.classes), source.first, max_pixels)
    except OSError as error:
        raise BadImage(f"mask {why_unreadable(error)}") from error
    except BadImage as error:
        raise BadImage(f"mask: {error}") from error
    if mask.shape != image.shape[:2]:
        (height, width), (rows, columns) = image.shape[:2], mask.shape
        turned = "; one of them is turned by its EXIF" if (rows, columns) == (width, height) else ""
        raise BadImage(f"mask of {columns} x {rows} pixels, image of {width} x {height}{turned}")
    return Pair(image, mask, counts)


def decode_mask(
    file: bytes, num_classes: int, first: int, max_pixels: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(classes (H, W) uint8, pixels of each (num_classes,)) of a PNG: palette, whose indices count, or grey of 1 to 16 bits.

    first: as MaskSource.first. Raises BadImage, for a value that is no class too.
    """
    from PIL import Image

    if why := why_no_mask_header(file[:33]):
        raise BadImage(why)
    image = Image.fromarray(_values(file, max_pixels))
    found = np.array(image.histogram(), np.int64)
    classes = np.full(256, IGNORED, np.uint8)
    classes[first : first + num_classes] = np.arange(num_classes)
    known = classes != IGNORED
    known[0 if first else IGNORED] = True
    if (found[~known] > 0).any():
        raise BadImage(_no_class(int(np.flatnonzero((found > 0) & ~known)[0]), num_classes, first))
    return np.array(image.point(classes.tolist())), found[first : first + num_classes]


def _values(file: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """(H, W) uint8: the values as they are stored. Raises BadImage."""
    from PIL.PngImagePlugin import PngImageFile

    depth = file[24]
    try:
        image = PngImageFile(io.BytesIO(file))
        check_size("PNG", image.height, image.width, max_pixels)
        image.verify()  # its checksums; which ends with this reader
        image = PngImageFile(io.BytesIO(file))
        image.load()
        turn = orientation(image)
        values = np.asarray(image)
    except BadImage:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise BadImage(damaged(error)) from error
    if turn != 1:
        raise BadImage("its EXIF turns it; save it upright")
    if depth == 16 and values.max() > 255:
        raise BadImage(f"value {values.max()}: no class has a value above 255")
    if image.mode == "L" and depth < 8:  # Pillow spreads grey of 2 and 4 bits over 0 to 255
        values = values // (255 // (2**depth - 1))
    return values.astype(np.uint8)


def _no_class(value: int, num_classes: int, first: int) -> str:
    if first:
        return f"value {value}: must be 1 to {num_classes}, a class, or 0, which is ignored"
    return f"value {value}: must be 0 to {num_classes - 1}, a class, or 255, which is ignored"
