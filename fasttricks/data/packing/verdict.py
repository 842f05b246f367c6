"""Whether an image can be used, found by decoding it: by pack as training would, by scan strictly. No torch, no DALI.

Decoders repair damage silently. libjpeg fills a damaged scan with grey and gives a warning that DALI and PIL do not pass
on; scan takes the warning as the reason. JPEG: libjpeg-turbo, luma only, which still reads every bit of every channel, in
1.5 ms for 500 x 375 pixels. Others: Pillow, which compares a PNG's checksums.

It cannot find bytes of a JPEG's scan that were changed into another valid scan of the right length. A JPEG has no
checksum, so nothing but the original can tell. tests/test_data_scan.py counts how often that happens.
"""

from __future__ import annotations

from fasttricks.data.sources.decode import BadImage, decodable, decode
from fasttricks.data.sources.headers import HEADER_BYTES, image_format
from fasttricks.data.sources.jpeg import read_jpeg_header


def why_unusable(file: bytes, max_pixels: int) -> str:
    """The reason why training cannot use the image `file`, in words; empty where it can, after a silent repair too."""
    return _reason(file, max_pixels, strict=False)


def why_damaged(file: bytes, max_pixels: int) -> str:
    """Why the image `file` is bad, in words; empty where every bit of it decodes."""
    return _reason(file, max_pixels, strict=True)


def _reason(file: bytes, max_pixels: int, *, strict: bool) -> str:
    import simplejpeg

    try:
        ready = decodable(file, max_pixels)
        kind = image_format(ready[:HEADER_BYTES])
        # where it is not strict, libjpeg-turbo's own interface lets errors in later scans pass
        if kind == "PNG" or (kind == "JPEG" and not strict and read_jpeg_header(ready).scans > 1):
            decode(ready, max_pixels)
        elif kind == "JPEG":
            simplejpeg.decode_jpeg(ready, "GRAY", fastdct=True, strict=strict)
        elif strict and image_format(file[:HEADER_BYTES]) == "JPEG" and (space := _color_space(file)):
            simplejpeg.decode_jpeg(file, space, fastdct=True)
    except BadImage as error:
        return str(error)
    except ValueError as error:
        return f"damaged or cut off: {error}"
    return ""


def _color_space(file: bytes) -> str:
    """As which a JPEG of an odd kind, which Pillow has decoded, can be decoded strictly too; empty where it cannot."""
    import simplejpeg

    try:
        *_, space, _ = simplejpeg.decode_jpeg_header(file)
    except ValueError:
        return ""
    return "CMYK" if space in ("CMYK", "YCCK") else "GRAY"
