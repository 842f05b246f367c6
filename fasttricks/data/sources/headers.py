"""What is wrong with an encoded image, found from its header and its end, before anything is decoded. No torch, no DALI.

`problem` is asked of every file that is read, so sizes are parsed here, in microseconds; PIL takes a hundred, and gives
the memory for a large WebP before it tells its size. A file that does not end as its format asks is decoded by PIL, which is
strict, as it may only have something appended: whether DALI fails on a file that was cut depends on the crop.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable

# What DALI decodes: first bytes -> name. WebP has four bytes of size between RIFF and WEBP; PNM has its own rule below.
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
HEADER_BYTES = 12
_TAIL_BYTES = 64  # how far before a file's end its end marker may stand, so that PIL need not be asked
_PNM_GAP = rb"(?:\s|#[^\n]*\n)+"  # one way to match, so that no file can make the search long
_PNM_SIZE = re.compile(rb"P[1-6]" + _PNM_GAP + rb"(\d{1,9})" + _PNM_GAP + rb"(\d{1,9})\s")
_PNM_HEADER_BYTES = 1 << 16
_JPEG_SEGMENTS = 10_000  # more before the size, or so many bytes of padding, are no header
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 to SOF15, less DHT, JPG and DAC


def image_format(header: bytes) -> str | None:
    """Name of the image format whose signature the first 12 bytes of a file carry; None if DALI decodes no such."""
    for magic, name in _MAGIC.items():
        if header.startswith(magic):
            return name
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return "WebP"
    if header[:1] == b"P" and header[1:2] in b"123456" and header[2:3].isspace():
        return "PNM"
    return None


def why_no_image(header: bytes) -> str | None:
    """What is wrong with a file of which these are the first bytes, 12 or more if it has them; None for an image."""
    if image_format(header) is not None:
        return None
    return f"no image: first bytes {header[:HEADER_BYTES]!r}" if header else "0 bytes long"


def problem(file: bytes, max_pixels: int) -> str | None:
    """Why the image `file` is not to be decoded, in words; None where nothing is found.

    It is empty, of no format that DALI decodes, without a size in its header, larger than `max_pixels` or cut off. What
    only decoding shows is not found. Cost: a few microseconds.
    """
    kind = image_format(file[:HEADER_BYTES])
    if kind is None:
        return why_no_image(file[:HEADER_BYTES])
    try:
        height, width = _SIZES[kind](file)
    except (struct.error, IndexError):  # shorter than its header
        height, width = 0, 0
    if not (height and width):
        return f"{kind} without a size in its header"
    if height * width > max_pixels:
        return (
            f"{width} x {height} = {height * width:,} pixels, over data.max_pixels = {max_pixels:,}; "
            f"raise it if that is what the image is"
        )
    return None if _ends(kind, file) else _why_cut(file)


def jpeg_size(file: bytes) -> tuple[int, int]:
    """(height, width) in the header of a JPEG, as stored; (0, 0) where it has none."""
    at = 2
    for _ in range(_JPEG_SEGMENTS):
        if at > len(file) - 9 or file[at] != 0xFF:
            return 0, 0
        marker = file[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _FRAMES:
            return file[at + 5] << 8 | file[at + 6], file[at + 7] << 8 | file[at + 8]
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # they stand alone
            at += 2
        elif marker in (0xD9, 0xDA):  # end of image, start of scan
            return 0, 0
        else:
            at += 2 + (file[at + 2] << 8 | file[at + 3])
    return 0, 0


def _png_size(file: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", file, 16)
    return (height, width) if file[12:16] == b"IHDR" else (0, 0)


def _webp_size(file: bytes) -> tuple[int, int]:
    kind = file[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", file, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", file, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X" and len(file) >= 30:
        return int.from_bytes(file[27:30], "little") + 1, int.from_bytes(file[24:27], "little") + 1
    return 0, 0


def _bmp_size(file: bytes) -> tuple[int, int]:
    old = struct.unpack_from("<I", file, 14)[0] == 12  # OS/2
    width, height = struct.unpack_from("<HH" if old else "<ii", file, 18)
    return abs(height), abs(width)  # a height below 0: rows from the top


def _tiff_size(file: bytes) -> tuple[int, int]:
    """Of the first image: tags 257 and 256, each one number of two or four bytes."""
    order = "<" if file[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", file, 4)
    sides = {}
    for entry in range(struct.unpack_from(order + "H", file, at)[0]):
        tag, kind = struct.unpack_from(order + "HH", file, at + 2 + 12 * entry)
        if tag in (256, 257):
            (sides[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), file, at + 10 + 12 * entry)
    return sides.get(257, 0), sides.get(256, 0)


def _jpeg_2000_size(file: bytes) -> tuple[int, int]:
    """Of the codestream, whatever the boxes around it say."""
    at = file.find(b"\xff\x4f\xff\x51")
    if at < 0:
        return 0, 0
    right, bottom, left, top = struct.unpack_from(">IIII", file, at + 8)
    return max(0, bottom - top), max(0, right - left)


def _pnm_size(file: bytes) -> tuple[int, int]:
    found = _PNM_SIZE.match(file[:_PNM_HEADER_BYTES])
    return (int(found[2]), int(found[1])) if found else (0, 0)


_SIZES: dict[str, Callable[[bytes], tuple[int, int]]] = {
    "JPEG": jpeg_size,
    "PNG": _png_size,
    "WebP": _webp_size,
    "BMP": _bmp_size,
    "TIFF": _tiff_size,
    "JPEG 2000": _jpeg_2000_size,
    "PNM": _pnm_size,
}
"""(height, width) as the header has it, EXIF's turn aside; (0, 0) where it has none."""


def _ends(kind: str, file: bytes) -> bool:
    """Whether `file` has the end that its format asks for; True for those that ask for none."""
    if kind == "JPEG":
        return b"\xff\xd9" in file[-_TAIL_BYTES:]
    if kind == "PNG":
        return b"IEND" in file[-_TAIL_BYTES:]
    return kind != "WebP" or len(file) >= 8 + int.from_bytes(file[4:8], "little")


def _why_cut(file: bytes) -> str | None:
    """None where PIL, which refuses what was cut off, decodes the file."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file)) as image:
            image.load()
    except Exception as error:  # a damaged file fails in many ways
        return f"cut off: {error}"
    return None
