"""Images as bytes, and every kind of file that is bad or odd."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FULL = ("b", "2.jpg")
"""The file that is exchanged: in the middle of the data set, with images of its class before and after it."""


def smooth(mode: str, size: tuple[int, int] = (80, 64), shift: int = 0) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    rgb = np.stack([x * 3, y * 3.5 + shift, 255 - x - y - shift], -1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def noise(size: tuple[int, int] = (120, 90)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))


JPEG, PNG, WEBP = encoded(noise()), encoded(noise(), "PNG"), encoded(noise(), "WEBP")
TURNED = Image.Exif()
TURNED[0x0112] = 6  # a quarter turn


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


def png_bomb(side: int = 20_000) -> bytes:
    """A PNG of 400 million black pixels, one bit each, in 50 KB."""
    return png(side, side, 1, 0, bytes((side // 8 + 1) * side))


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    at = jpeg.index(b"\xff\xc0")
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def webp_bomb() -> bytes:
    """The header of 16,383 pixels square, the most that there can be."""
    small = encoded(smooth("RGB"), "WEBP", lossless=True)
    assert small[12:16] == b"VP8L"
    bits = struct.unpack_from("<I", small, 21)[0] & ~0xFFFFFFF | 16382 | 16382 << 14
    return small[:21] + struct.pack("<I", bits) + small[25:]


def deep_png() -> bytes:
    """16 bits a channel, RGB."""
    rows = np.zeros((64, 80, 3), ">u2")
    rows[:] = np.asarray(smooth("RGB"), np.uint16) * 257
    return png(80, 64, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))


def damaged_scan() -> bytes:
    middle = JPEG.index(b"\xff\xda") + 2000
    return JPEG[:middle] + bytes(range(1, 200)) + JPEG[middle + 199 :]


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    path.write_bytes(JPEG)
    os.truncate(path, 1 << 40)


@dataclass
class Kind:
    """How to make the file, and what is to be said of it; no reason: it is decoded."""

    make: bytes | Callable[[], bytes] | Callable[[Path], None]
    reason: str = ""
    name: str = FULL[1]
    tolerance: float = 4.0
    """Grey levels that a pixel may be from what PIL makes of the file."""


KINDS: dict[str, Kind] = {
    "zero bytes": Kind(b"", "0 bytes long"),
    "text": Kind(b"no image at all", "no image: first bytes b'no image"),
    "GIF": Kind(encoded(noise(), "GIF"), "GIF8", "2.gif"),
    "GIF named jpg": Kind(encoded(noise(), "GIF"), "GIF8"),
    "HEIC": Kind(b"\0\0\0\x18ftypheic" + bytes(99), "ftypheic", "2.heic"),
    "cut header": Kind(JPEG[:100], "JPEG without a size in its header"),
    "cut after the header": Kind(JPEG[: JPEG.index(b"\xff\xda")], "cut off"),
    "cut tail": Kind(JPEG[: len(JPEG) // 2], "cut off: image file is truncated"),
    "cut PNG": Kind(PNG[: len(PNG) // 2], "cut off"),
    "cut PNG header": Kind(PNG[:20], "damaged or cut off: "),
    "cut WebP": Kind(WEBP[: len(WEBP) // 2], "cut off"),
    "damaged PNG": Kind(PNG[:1000] + bytes(500) + PNG[1500:], "damaged or cut off: "),
    "damaged scan": Kind(damaged_scan, tolerance=255),  # what is seen of it is the decoder's choice
    "no size": Kind(with_size(JPEG, 0, 0), "JPEG without a size in its header"),
    "PNG bomb": Kind(png_bomb, "20000 x 20000 = 400,000,000 pixels, over data.max_pixels = 100,000,000"),
    "JPEG bomb": Kind(with_size(JPEG, 65500, 65500), "65500 x 65500 = 4,290,250,000 pixels, over data.max_pixels"),
    "WebP bomb": Kind(webp_bomb, "16383 x 16383 = 268,402,689 pixels, over data.max_pixels"),
    "folder": Kind(Path.mkdir, "unreadable: Is a directory"),
    "dangling link": Kind(lambda path: path.symlink_to("nowhere"), "unreadable: No such file"),
    "loop of links": Kind(loop, "unreadable: Too many levels of symbolic links"),
    "pipe": Kind(os.mkfifo, "0 bytes long"),
    "a terabyte": Kind(sparse, "unreadable: 1,099,511,627,776 bytes long"),
    "CMYK": Kind(encoded(smooth("CMYK"))),
    "grey": Kind(encoded(smooth("L"))),
    "16 bits": Kind(deep_png),
    "16 bits grey": Kind(encoded(Image.fromarray(np.asarray(smooth("L"), np.uint16) * 257), "PNG")),
    "palette with alpha": Kind(encoded(smooth("RGBA").quantize(), "PNG")),
    "EXIF turned": Kind(encoded(smooth("RGB"), exif=TURNED)),
    "progressive": Kind(encoded(smooth("RGB"), progressive=True)),
    "huge": Kind(lambda: encoded(smooth("RGB").resize((5000, 4000)))),
    "one pixel": Kind(encoded(smooth("RGB", (1, 1)), "PNG")),
    "no end marker": Kind(encoded(smooth("RGB"))[:-2], "cut off"),
    "bytes after the end": Kind(encoded(smooth("RGB")) + bytes(1000)),
    "PNG named jpg": Kind(encoded(smooth("RGB"), "PNG")),
    "WebP named jpg": Kind(encoded(smooth("RGB"), "WEBP", lossless=True)),
    "non-ASCII name": Kind(encoded(smooth("RGB")), name="2 犬é.jpg"),
    "new line in the name": Kind(encoded(smooth("RGB")), name="2\n'\".jpg"),
    "name that is no UTF-8": Kind(encoded(smooth("RGB")), name=os.fsdecode(b"2\xff\xfe.jpg")),
    "bad file of such a name": Kind(b"text", "no image", name=os.fsdecode(b"2\n\xff.jpg")),
}


def put(root: Path, kind: Kind) -> Path:
    path = root / FULL[0] / FULL[1]
    path.unlink()
    path = path.with_name(kind.name)
    if isinstance(kind.make, bytes):
        path.write_bytes(kind.make)
    else:
        try:
            path.write_bytes(kind.make())  # type: ignore[call-arg]
        except TypeError:
            kind.make(path)  # type: ignore[call-arg]
    return path
