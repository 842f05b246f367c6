"""The zoo: an image of each format, mode, bit depth and compression that Pillow writes, forms that it does not write, and
each of them cut, flipped and with hostile fields in its header.
"""

from __future__ import annotations

import itertools
import struct
from typing import Any

import numpy as np
from PIL import Image

from lib.images import encoded, png, smooth

SIZE = (40, 36)
_PLAIN, _ALPHA, _DEEP = ("L", "RGB"), ("LA", "RGBA"), ("I;16", "I", "F")
_PRINT = ("CMYK", "YCbCr", "LAB")
FORMATS: list[tuple[str, tuple[str, ...], list[dict[str, Any]]]] = [
    ("PNG", ("1", "P", *_PLAIN, *_ALPHA, "I;16"), [{}, {"compress_level": 0}]),
    ("JPEG", (*_PLAIN, "CMYK"), [{}, {"progressive": True}, {"restart_marker_rows": 1}]),
    ("JPEG", ("RGB",), [{"subsampling": kind} for kind in (0, 1, 2)] + [{"keep_rgb": True}, {"optimize": True}]),
    ("WEBP", (*_PLAIN, *_ALPHA), [{}, {"lossless": True}]),
    ("BMP", ("1", "P", *_PLAIN, "RGBA"), [{}]),
    ("TIFF", ("1", "P", *_PLAIN, *_ALPHA, *_PRINT, *_DEEP), [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}]),
    ("TIFF", ("1", "L", "RGB"), [{"compression": kind} for kind in ("packbits", "tiff_deflate", "zstd", "lzma")]),
    ("TIFF", ("L", "RGB", "YCbCr"), [{"compression": "jpeg"}]),
    ("TIFF", ("1",), [{"compression": "group3"}, {"compression": "group4"}]),
    ("JPEG2000", (*_PLAIN, *_ALPHA, "I;16"), [{}, {"no_jp2": True}]),
    ("JPEG2000", ("RGB",), [{"irreversible": True, "quality_layers": [20]}, {"tile_size": (16, 16)}]),
    ("PPM", ("1", *_PLAIN, "I"), [{}]),
]
"""Format, the modes of Pillow that it may hold, options."""


def picture(mode: str) -> Image.Image:
    """The same colours in any mode."""
    if mode in ("I", "F", "I;16"):
        grey = np.asarray(smooth("L", SIZE))
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        return Image.fromarray((grey * 257.0 if mode[0] == "I" else grey / 255.0).astype(kind))
    image = smooth("RGB", SIZE)
    if mode in ("LA", "RGBA"):
        image.putalpha(smooth("L", SIZE, shift=90))
    return image.convert(mode) if mode != "LAB" else Image.merge("LAB", image.split())


def written_by_pillow() -> dict[str, bytes]:
    """Each format in each of its modes and options."""
    found = {}
    for kind, modes, variants in FORMATS:
        for mode, options in itertools.product(modes, variants):
            words = " ".join(f"{name}={value}" for name, value in options.items())
            found[f"{kind} {mode} {words}".strip()] = encoded(picture(mode), kind, **options)
    return found


def turned(order: str, turn: int, kind: int = 3) -> bytes:
    """EXIF of an orientation, as a number of kind 1 (byte), 3 (short) or 4 (long)."""
    value = struct.pack(order + {1: "Bxxx", 3: "Hxx", 4: "I"}[kind], turn)
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return b"Exif\0\0" + start + struct.pack(order + "HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def written_by_hand() -> dict[str, bytes]:
    """Forms that Pillow reads and does not write, and those that other projects met."""
    jpeg, rgb = encoded(smooth("RGB", SIZE)), np.asarray(smooth("RGB", SIZE))
    bmp = encoded(smooth("RGB", SIZE), "BMP")
    text = f"{SIZE[0]} {SIZE[1]}\n7\n" + " ".join(map(str, (rgb.reshape(-1) // 37).tolist()))
    deep = np.asarray(rgb, ">u2") * 257
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turns = {f"JPEG turned {o}{n}": with_segment(jpeg, 0xE1, turned(o, n)) for o in "<>" for n in (0, 2, 5, 6, 7, 8, 9)}
    return {
        **turns,
        "JPEG turned by a byte": with_segment(jpeg, 0xE1, turned("<", 6, 1)),
        "JPEG turned by a long": with_segment(jpeg, 0xE1, turned(">", 6, 4)),
        "JPEG turned by XMP": with_segment(jpeg, 0xE1, xmp),
        "JPEG turned twice": with_segment(with_segment(jpeg, 0xE1, turned("<", 6)), 0xE1, turned("<", 3)),
        "JPEG with junk for EXIF": with_segment(jpeg, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"),
        "JPEG with short EXIF": with_segment(jpeg, 0xE1, b"Exif"),
        "JPEG CMYK without Adobe": without_adobe(encoded(smooth("CMYK", SIZE))),
        "JPEG of 12 bits": jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"),
        "JPEG lossless": jpeg.replace(b"\xff\xc0", b"\xff\xc3"),
        "JPEG of two frames": jpeg.replace(b"\xff\xda", jpeg[jpeg.index(b"\xff\xc0") :][:19] + b"\xff\xda"),
        "JPEG of many scans": many_scans(),
        "PNG of 16 bits": png(*SIZE, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)),
        "PNG of 2 bits": png(40, 36, 2, 0, (b"\0" + bytes(range(10))) * 36),
        "PNG of a class": encoded(smooth("RGBA", SIZE).quantize(), "PNG"),
        "PNM of 3 bits": b"P6\n40 36\n7\n" + (rgb // 37).tobytes(),
        "PNM grey of 10 bits": b"P5\n40 36\n1023\n" + (deep[..., 0] // 64).astype(">u2").tobytes(),
        "PNM of text": b"P3\n" + text.encode(),
        "BMP of no such depth": bmp[:28] + b"\x4d\0" + bmp[30:],
        "BMP of 16 bits": bmp[:28] + b"\x10\0" + bmp[30:],
        "BMP from the top": bmp[:22] + struct.pack("<i", -36) + bmp[26:],
        "PNG of 20,000 x 1": encoded(smooth("RGB", (20_000, 1)), "PNG"),
        "JPEG of 1 x 20,000": encoded(smooth("RGB", (1, 20_000))),
        "PNG of too long a side": encoded(Image.new("L", (70_000, 1)), "PNG"),
    }


def many_scans(count: int = 1000) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each a pass over all pixels for a few bytes."""
    jpeg = encoded(smooth("RGB", SIZE), progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * count + b"\xff\xd9"


def damaged(name: str, file: bytes, seed: int) -> dict[str, bytes]:
    """`file`, damaged in each way."""
    rng = np.random.default_rng([seed, len(file)])
    header = min(len(file) - 1, 64 if file[:2] != b"\xff\xd8" else file.rindex(b"\xff\xda"))

    def flipped(low: int, high: int) -> bytes:
        changed = bytearray(file)
        for at in rng.integers(low, high, 3):
            changed[at] ^= 1 << int(rng.integers(8))
        return bytes(changed)

    field = int(rng.integers(8, header - 4)) if header > 12 else 2
    hostile = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"][seed % 3]
    return {
        f"{name} cut": file[: int(rng.integers(header, len(file)))],
        f"{name} cut in its header": file[: int(rng.integers(2, header))],
        f"{name} flipped": flipped(header, len(file)) if header + 1 < len(file) else flipped(2, len(file)),
        f"{name} flipped in its header": flipped(2, header),
        f"{name} with a hostile field": file[:field] + hostile + file[field + 4 :],
    }
