"""The header of a JPEG, read to its first scan: its size, and whether it is of the plain kind. No torch, no DALI.

Asked of every file that is read, so it costs microseconds.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

_SEGMENTS = 10_000  # more before the first scan, or so many bytes of padding, are no header
_TAIL_BYTES = 64  # how far before a file's end its end marker may stand
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 to SOF15, less DHT, JPG and DAC
_PLAIN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; Huffman-coded, not lossless
_PASSED = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xEE), 0xEF})  # DHT, DQT, DRI, COM, most of APPn
_ALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a segment
_SUBSAMPLED = frozenset(bytes([luma, 0x11, 0x11]) for luma in (0x11, 0x21, 0x12, 0x22, 0x41))
"""4:4:4, 4:2:2, 4:4:0, 4:2:0 and 4:1:1."""
_SOF2, _EOI, _SOS, _APP1, _APP14 = 0xC2, 0xD9, 0xDA, 0xE1, 0xEE
_ORIENTATION = 0x0112


class JpegHeader(NamedTuple):
    """The facts before the first scan."""

    height: int
    """As stored, EXIF's turn aside; 0: none is given."""
    width: int
    plain: bool
    """8 bits, grey or YCbCr, baseline, extended or progressive, each segment whole, and an end marker: no decoder fails on
    such a header."""
    scans: int
    """How often a decoder goes over the image."""
    app1: tuple[tuple[int, int], ...]
    """First byte and end of each segment that may hold EXIF or XMP."""


def read_jpeg_header(file: bytes) -> JpegHeader:
    """The header of a file that begins as a JPEG does; without a size where it has no frame."""
    at, plain, components = 2, True, 0
    header = JpegHeader(0, 0, False, 1, ())
    app1: list[tuple[int, int]] = []
    try:
        for _ in range(_SEGMENTS):
            if file[at] != 0xFF:
                break
            marker = file[at + 1]
            if marker == 0xFF:  # padding
                at += 1
                continue
            if marker in _ALONE:
                plain, at = False, at + 2
                continue
            end = at + 2 + (file[at + 2] << 8 | file[at + 3])  # where it is too small, no marker is found there
            if marker in _PASSED:
                pass
            elif marker in _FRAMES:
                if header.width:  # a second one
                    break
                components = file[at + 9]
                plain &= marker in _PLAIN_FRAMES and _plain_frame(file[at + 4 : end])
                height, width = file[at + 5] << 8 | file[at + 6], file[at + 7] << 8 | file[at + 8]
                header = JpegHeader(height, width, False, 1 + (marker == _SOF2), ())
            elif marker == _SOS:
                in_scan, scans = file[at + 4], header.scans
                plain &= 1 <= in_scan <= components and end == at + 8 + 2 * in_scan and end < len(file)
                if in_scan < components or scans > 1:
                    scans = file.count(b"\xff\xda", at)
                return header._replace(plain=plain and _ends(file), scans=scans, app1=tuple(app1))
            elif marker == _EOI:
                break
            elif marker == _APP1:
                app1.append((at, end))
            else:  # of Adobe's transforms, 1 is YCbCr
                plain &= marker == _APP14 and (file[at + 4 : at + 9] != b"Adobe" or file[at + 15] == 1)
            at = end
    except IndexError:  # it ends within its header
        pass
    return header


def _plain_frame(frame: bytes) -> bool:
    """Whether a frame header is plain, behind its length: 8 bits; one component, or three, no RGB, with a usual subsampling."""
    components = frame[6:]
    if frame[0] != 8 or len(components) != 3 * frame[5] or max(components[2::3], default=4) > 3:
        return False
    if frame[5] == 1:
        return components[1] == 0x11
    return frame[5] == 3 and components[1::3] in _SUBSAMPLED and components[::3] != b"RGB"


def _ends(file: bytes) -> bool:
    return b"\xff\xd9" in file[-_TAIL_BYTES:]


def with_plain_orientation(file: bytes, header: JpegHeader) -> bytes:
    """The same JPEG, without EXIF and XMP but for the turn that Pillow finds in them, in the one form that all readers know.

    DALI turns by EXIF's 16-bit number alone, Pillow by XMP too and not by a number of 8 bits. Raises as Pillow for a header
    that it refuses. Cost where there is EXIF: 0.2 ms and a copy of the file.
    """
    if not header.app1:
        return file
    from PIL.JpegImagePlugin import JpegImageFile

    turn = orientation(JpegImageFile(io.BytesIO(file)))
    parts, at = [file[:2], _exif(turn) if turn != 1 else b""], 2
    for start, end in header.app1:
        parts.append(file[at:start])
        at = end
    return b"".join([*parts, file[at:]])


def orientation(image: Image.Image) -> int:
    """EXIF's turn of a PIL image, 1 to 8; 1, as it is stored, where it has none that can be read."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF fails in many ways, and is no damage of the pixels
        return 1
    return turn if turn in range(1, 9) else 1


def _exif(turn: int) -> bytes:
    """An APP1 segment that says so and no more."""
    tiff = b"II*\0\x08\0\0\0" + b"\x01\0" + b"\x12\x01\x03\0\x01\0\0\0" + bytes([turn, 0, 0, 0]) + b"\0\0\0\0"
    content = b"Exif\0\0" + tiff
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
