"""An image as packing stores it: smaller, as a JPEG. No DALI, no torch."""

from __future__ import annotations

import io
import zlib
from typing import NamedTuple

from PIL import Image

from fasttricks.data.packing.verdict import why_unusable
from fasttricks.data.sources.decode import BadImage, decode

QUALITY = 90
"""Where images are resized and no quality is given."""


class Packed(NamedTuple):
    """One image as it is stored."""

    content: bytes
    crc: int
    trouble: str = ""
    """Why training will not use it, though it is stored, as it is; empty: it will."""
    bad: str = ""
    """Why it could not be read; empty: it could."""


def encode(content: bytes, short_side: int, quality: int, max_pixels: int) -> Packed:
    """An image as it is stored: upright, its short side at most `short_side`, as a JPEG; 0: that stays as it is.

    The filter is the loader's, bilinear widened where it shrinks, the chroma is halved (4:2:0). Where nothing shrinks, the
    smaller of the file and its new encoding is kept. An image that training cannot use is kept as it is.
    """
    stored = content
    try:
        if short_side or quality:
            stored = _smaller(content, short_side, quality, max_pixels)
            trouble = ""
        else:
            trouble = why_unusable(content, max_pixels)
    except BadImage as error:
        trouble = str(error)
    return Packed(stored, zlib.crc32(stored), trouble)


def _smaller(content: bytes, short_side: int, quality: int, max_pixels: int) -> bytes:
    image = decode(content, max_pixels)
    scale = short_side / min(image.size)
    shrinks = 0 < scale < 1
    if shrinks:
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality or QUALITY, subsampling="4:2:0", optimize=True)
    return buffer.getvalue() if shrinks or buffer.tell() < len(content) else content
