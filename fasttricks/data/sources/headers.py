"""The image formats that are read, recognised by a file's first bytes. No torch, no DALI."""

from __future__ import annotations

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
"""First bytes -> name. The second pair of TIFF is BigTIFF. WebP has its size between RIFF and WEBP; PNM has a rule below."""
HEADER_BYTES = 12


def image_format(header: bytes) -> str | None:
    """Name of the image format whose signature the first 12 bytes of a file carry; None if none is read."""
    for magic, name in _MAGIC.items():
        if header.startswith(magic):
            return name
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return "WebP"
    if header[:1] == b"P" and header[1:2] in b"123456" and header[2:3].isspace():
        return "PNM"
    return None


def why_no_image(header: bytes) -> str | None:
    """The fault of a file with these first bytes, 12 or more if it has them; None for an image."""
    if image_format(header) is not None:
        return None
    return f"no image: first bytes {header[:HEADER_BYTES]!r}" if header else "0 bytes long"
