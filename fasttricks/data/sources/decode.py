"""The bytes that DALI gets of an image file: a plain JPEG or PNG unchanged; every other image is decoded here.

DALI gives up a batch when it cannot read the header of one image, while other threads still write into that batch: the
process ends by a signal, or continues with memory that it does not own (docs/data.md). So it gets only headers that cannot fail.
Every other format, and every JPEG or PNG of an odd kind, is decoded by Pillow, under the limits below, and handed over as
uncompressed pixels, a PNM. Training, validation, scan, pack and predict all ask here, so that they agree. No torch, no DALI.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
from typing import TYPE_CHECKING

import numpy as np

from fasttricks.data.sources.headers import HEADER_BYTES, image_format, why_no_image
from fasttricks.data.sources.jpeg import JpegHeader, orientation, read_jpeg_header, with_plain_orientation
from fasttricks.data.sources.png import plain_png_size

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

_LONGEST_SIDE = 65_535
"""The longest side of a JPEG, pixels. DALI's reader of PNM has a limit too, far above."""
_MOST_SCANS = 100
"""The most scans of a JPEG. Encoders write 10 to 20. A scan is a pass over all pixels, 1 ns each, even of few bytes."""
_MOST_WORK = 20
"""Scans of a JPEG of max_pixels; a smaller one may have more."""
_MOST_TILES = 10_000
"""The most tiles of a JPEG 2000: its decoder keeps 6 KB for each, however small."""
_TILE_BYTES = 14
"""The least that a tile of a JPEG 2000 takes in its file."""
_MOST_TEXT_BYTES = 2_000_000
"""The most bytes of a PNM whose numbers are text: Pillow reads 4 MB a second."""

_PNM_GAP = rb"(?:\s|#[^\n]*\n)+"  # one way to match, so that no file can make the search long
_PNM_HEADER = re.compile(rb"P[1-6]" + _PNM_GAP + rb"\d{1,9}" + _PNM_GAP + rb"\d{1,9}\s")
_PNM_HEADER_BYTES = 1 << 12


class BadImage(ValueError):
    """An image that is not to be used. The message is the reason, to follow the file's name."""


def decodable(file: bytes, max_pixels: int) -> bytes:
    """The image `file` in the form that DALI takes: a plain JPEG or PNG, or a PNM of 8 bits. Upright or with EXIF's turn in it.

    Raises BadImage where it is empty, of no known format, over a limit, or cannot be decoded by Pillow. Damage in the pixels of
    a plain JPEG is not found. Cost: 10 us for a plain JPEG, 0.35 ms a megabyte for a plain PNG; else Pillow's decoding, without
    the GIL for most of it.
    """
    kind = _known_format(file)
    if kind == "JPEG" and (header := read_jpeg_header(file)).plain:
        _check_jpeg(header, max_pixels)
        return _plain_jpeg(file, header)
    if kind == "PNG" and (size := plain_png_size(file)):
        check_size(kind, *size, max_pixels)
        return file
    return to_pnm(decode(file, max_pixels))


def decode(file: bytes, max_pixels: int) -> Image.Image:
    """The first image in `file`, by Pillow: upright, 8 bits, grey ("L") or else as convert("RGB") has it.

    16 bits are scaled to 8; transparency is dropped. Raises BadImage, also for 32-bit pixels, whose range nobody knows, and
    for a PNG that fails its checksums.
    """
    kind = _known_format(file)
    if kind == "JPEG":
        _check_jpeg(read_jpeg_header(file), max_pixels)
    if kind == "WebP":
        check_size(kind, *_webp_size(file), max_pixels)  # Pillow allocates the pixels before it tells the size
    if kind == "JPEG 2000":
        _check_tiles(file)
    if kind == "PNM":
        _check_pnm(file)
    try:
        image = _plugin(kind)(io.BytesIO(file))
        check_size(kind, image.height, image.width, max_pixels)
        if kind == "PNG":
            image.verify()  # its checksums; which ends with this reader
            image = _plugin(kind)(io.BytesIO(file))
        image.load()
        return _eight_bits(_upright(image), kind)
    except BadImage:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise BadImage(damaged(error)) from error


def to_pnm(image: Image.Image) -> bytes:
    """An image of mode L or RGB as a PGM or PPM, uncompressed."""
    kind = b"P5" if image.mode == "L" else b"P6"
    return b"%s\n%d %d\n255\n" % (kind, *image.size) + image.tobytes()


def quiet_pillow() -> None:
    """Leave out Pillow's warnings of repaired damage. For this process: its threads share the filters."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _plain_jpeg(file: bytes, header: JpegHeader) -> bytes:
    try:
        return with_plain_orientation(file, header)
    except Exception as error:  # a damaged file fails in many ways
        raise BadImage(damaged(error)) from error


def _known_format(file: bytes) -> str:
    kind = image_format(file[:HEADER_BYTES])
    if kind is None:
        raise BadImage(why_no_image(file[:HEADER_BYTES]))
    return kind


def _check_jpeg(header: JpegHeader, max_pixels: int) -> None:
    check_size("JPEG", header.height, header.width, max_pixels)
    most = min(_MOST_SCANS, _MOST_WORK * max_pixels // (header.height * header.width))
    if header.scans > most:
        size = f"{header.width} x {header.height} pixels"
        raise BadImage(f"JPEG of {header.scans:,} scans, over the {most} allowed for {size}; save it again with fewer")


def check_size(kind: str, height: int, width: int, max_pixels: int) -> None:
    """Raise BadImage for an image of that format without a size, or over a limit."""
    if height < 1 or width < 1:
        raise BadImage(f"{kind} without a size in its header")
    if height * width > max_pixels:
        raise BadImage(
            f"{width} x {height} = {height * width:,} pixels, over data.max_pixels = {max_pixels:,}; "
            f"raise it if that is the image's true size"
        )
    if max(height, width) > _LONGEST_SIDE:
        raise BadImage(f"{width} x {height} pixels: no side may be over {_LONGEST_SIDE:,}; cut it")


def _webp_size(file: bytes) -> tuple[int, int]:
    """(height, width) in the header; (0, 0) where it has none."""
    kind, header = file[12:16], file[:30].ljust(30, b"\0")
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", header, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L" and len(file) >= 25:
        (bits,) = struct.unpack_from("<I", header, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X" and len(file) >= 30:
        return int.from_bytes(file[27:30], "little") + 1, int.from_bytes(file[24:27], "little") + 1
    return 0, 0


def _check_tiles(file: bytes) -> None:
    """Check the tiles of the codestream, whatever the boxes around it say."""
    at = file.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(file) < at + 42:
        raise BadImage("JPEG 2000 without a size in its header")
    right, bottom, _, _, width, height, left, top = struct.unpack_from(">8I", file, at + 8)
    if not (width and height):
        raise BadImage("JPEG 2000 whose tiles have no size")
    tiles = -(-max(0, right - left) // width) * -(-max(0, bottom - top) // height)
    if tiles > _MOST_TILES:
        raise BadImage(f"JPEG 2000 of {tiles:,} tiles, over {_MOST_TILES:,}; save it again with larger tiles")
    if tiles * _TILE_BYTES > len(file):  # the decoder would fill the absent ones with black
        raise BadImage(f"cut off: JPEG 2000 of {tiles:,} tiles in {len(file):,} bytes")


def _check_pnm(file: bytes) -> None:
    if not _PNM_HEADER.match(file[:_PNM_HEADER_BYTES]):  # Pillow would read on to the end
        raise BadImage("PNM without a size in its header")
    if file[1:2] in b"123" and len(file) > _MOST_TEXT_BYTES:
        raise BadImage(
            f"PNM whose numbers are {len(file):,} bytes of text, over {_MOST_TEXT_BYTES:,}; save it as binary"
        )


@functools.cache
def _plugin(kind: str) -> type[ImageFile]:
    """Pillow's reader of the format. Image.open() would try all of them, and has a limit on pixels of its own."""
    from PIL import (
        BmpImagePlugin,
        Jpeg2KImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    return {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "PNG": PngImagePlugin.PngImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
        "PNM": PpmImagePlugin.PpmImageFile,
    }[kind]


def _upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF says, as ImageOps.exif_transpose does, which fails where EXIF is damaged."""
    from PIL.Image import Transpose as Turn

    turns = [
        *(Turn.FLIP_LEFT_RIGHT, Turn.ROTATE_180, Turn.FLIP_TOP_BOTTOM),
        *(Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90),
    ]
    turn = orientation(image)
    return image if turn == 1 else image.transpose(turns[turn - 2])


def _eight_bits(image: Image.Image, kind: str) -> Image.Image:
    from PIL import Image

    mode = image.mode
    if mode == "F" or (mode == "I" and kind not in ("PNG", "PNM")):  # those two mean 16 bits by it
        pixels = "floating-point" if mode == "F" else "32-bit integer"
        raise BadImage(f"{kind} of {pixels} pixels, whose range is not known; save it with 8 or 16 bits")
    if mode == "I" or mode.startswith("I;16"):  # convert() would cut 65535 to 255
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if mode in ("1", "L", "LA"):
        return image.convert("L")
    if "transparency" in image.info:  # Pillow warns of some that are made RGB at once
        image = image.convert("RGBA")
    return image.convert("RGB")


def damaged(error: Exception) -> str:
    """The reason in words of a file that a decoder refuses."""
    return f"damaged or cut off: {error or type(error).__name__}"
