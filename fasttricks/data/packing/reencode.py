"""An image as packing stores it: smaller, as a JPEG. No DALI, no torch."""

from __future__ import annotations

import io
import warnings
import zlib
from typing import NamedTuple

from PIL import Image, ImageOps

QUALITY = 90
"""Where images are resized and no quality is given."""
_MODES = {"L": "L", "1": "L", "RGB": "RGB", "P": "RGB", "RGBA": "RGB", "LA": "L", "CMYK": "RGB", "YCbCr": "RGB"}
"""How PIL holds an image -> as what it is stored. Others (16 bits a channel) are kept as they are."""


class Packed(NamedTuple):
    """One image as it is stored."""

    content: bytes
    crc: int
    trouble: str = ""
    """Why it was kept as it is though it should have been re-encoded; empty: there was none."""
    bad: str = ""
    """Why it could not be read; empty: it could."""


def encode(content: bytes, short_side: int, quality: int) -> Packed:
    """An image as it is stored: upright, its short side at most `short_side`, as a JPEG; 0: that stays as it is.

    The filter is the loader's, bilinear widened where it shrinks, the chroma is halved (4:2:0). Where nothing shrinks, the
    smaller of the file and its new encoding is kept.
    """
    if not short_side and not quality:
        return Packed(content, zlib.crc32(content))
    stored, trouble = content, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF tags: the pixels are what counts
            with Image.open(io.BytesIO(content)) as opened:
                shape, mode = opened.size, _MODES.get(opened.mode)
                if mode is None:
                    return Packed(content, zlib.crc32(content), f"pixels of kind {opened.mode}, stored as they are")
                image = ImageOps.exif_transpose(opened).convert(mode)
            scale = short_side / min(shape)
            shrinks = 0 < scale < 1
            if shrinks:
                image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality or QUALITY, subsampling="4:2:0", optimize=True)
            if shrinks or buffer.tell() < len(content):
                stored = buffer.getvalue()
    except (OSError, SyntaxError, ValueError, ArithmeticError, Image.DecompressionBombError) as error:
        trouble = f"cannot be decoded ({error}), stored as it is"
    return Packed(stored, zlib.crc32(stored), trouble)
