"""Files that claim to be more than they are: refused by their header, in less than a second and 200 MB."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fasttricks.data.sources.decode import BadImage, decodable
from lib.images import JPEG, TURNED, encoded, png, png_bomb, smooth, webp_bomb, with_size
from lib.tiny import environment
from lib.zoo import many_scans


def problem(file: bytes, max_pixels: int) -> str:
    """Why the file is refused; empty: it is not."""
    try:
        decodable(file, max_pixels)
    except BadImage as error:
        return str(error)
    return ""


def claiming(kind: str, at: int, form: str, *numbers: int, **options: Any) -> bytes:
    """A small image whose header says otherwise."""
    file = bytearray(encoded(smooth("RGB"), kind, **options))
    struct.pack_into(form, file, at, *numbers)
    return bytes(file)


def codestream(width: int, height: int, tile: int) -> bytes:
    """A JPEG 2000 of these sides, in pixels."""
    file = claiming("JPEG2000", 8, ">II", width, height, no_jp2=True)
    return file[:24] + struct.pack(">II", tile, tile) + file[32:]


def slow_scans() -> bytes:
    """Progressive, 25 million pixels, of which each scan is a few bytes."""
    jpeg = encoded(Image.new("RGB", (5000, 5000)), progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + 85 * last + b"\xff\xd9"


OVER = "pixels, over data.max_pixels = 100,000,000; raise it"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG": (png_bomb, OVER),
    "PNG of 65,536 a side": (lambda: png(65_536, 65_536, 1, 0, b""), OVER),
    "JPEG": (lambda: with_size(JPEG, 65500, 65500), OVER),
    "JPEG of 1,000 scans": (many_scans, "JPEG of 1,010 scans, over the 100 allowed for 40 x 36 pixels"),
    "JPEG of 95 large scans": (slow_scans, "JPEG of 95 scans, over the 80 allowed for 5000 x 5000 pixels"),
    "WebP": (webp_bomb, OVER),
    "BMP": (lambda: claiming("BMP", 18, "<ii", 60_000, 60_000), OVER),
    "JPEG 2000": (lambda: codestream(60_000, 60_000, 60_000), OVER),
    "JPEG 2000 of tiles": (lambda: codestream(9000, 9000, 1), "JPEG 2000 of 81,000,000 tiles, over 10,000"),
    "JPEG 2000 without its tiles": (lambda: codestream(9000, 9000, 100), "cut off: JPEG 2000 of 8,100 tiles in "),
    "PNM": (lambda: b"P6\n60000 60000\n255\n", OVER),
    "PNM of text": (lambda: b"P3\n2000 2000\n255\n" + b"7 " * 12_000_000, "24,000,017 bytes of text, over 2,000,000"),
    "TIFF": (lambda: encoded(smooth("RGB"), "TIFF").replace(tag(80), tag(60_000)).replace(tag(64), tag(60_000)), OVER),
}


def tag(value: int) -> bytes:
    """The end of a TIFF's entry, behind the number of its tag: one 32-bit number."""
    return struct.pack("<HII", 4, 1, value)


def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """In a process of its own: at most 200 MB more and a second each, where decoding takes gigabytes and minutes."""
    code = """
import resource, sys, time
from pathlib import Path
from fasttricks.data.sources.decode import BadImage, decodable, decode
for path in map(Path, sys.argv[1:]):
    file = path.read_bytes()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        reason = len(decodable(file, 100_000_000))
    except BadImage as error:
        reason = error
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(path.name, time.process_time() - start, used / 1024, reason, sep="|")
"""
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in BOMBS)]
    lines = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for line in lines:
        name, seconds, megabytes, reason = line.split("|")
        assert float(seconds) < 1, line
        assert float(megabytes) < 200, line
        assert BOMBS[name][1] in reason, line


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (7, 300)])
def test_the_size_in_a_header_is_what_pil_says(kind: str, size: tuple[int, int]) -> None:
    """max_pixels one short refuses it, max_pixels as large does not."""
    variants: list[dict[str, Any]] = {
        "WEBP": [{}, {"lossless": True}, {"exif": TURNED}],
        "JPEG": [{}, {"progressive": True}, {"exif": TURNED}],
        "JPEG2000": [{}, {"no_jp2": True}],
        "TIFF": [{}, {"compression": "tiff_lzw"}, {"big_endian": True}],
    }.get(kind, [{}])
    for options in variants:
        file = encoded(smooth("RGB", size), kind, **options)
        width, height = Image.open(io.BytesIO(file)).size
        assert not problem(file, width * height), options
        assert f"{width} x {height}" in problem(file, width * height - 1), options


@pytest.mark.parametrize(
    "file",
    [
        b"\xff\xd8" + b"\xff" * (20 << 20),
        b"\xff\xd8\xff" + b"\xff\xd0" * (10 << 20),
        b"P6" + b" #" * (1 << 20),
        b"P6" + b" " * (20 << 20),
        b"P6" + b"\n#" * (1 << 20),
        b"II*\0\x08\0\0\0" + b"\xff" * (20 << 20),
        b"\xff\x4f\xff\x51" * (5 << 20),
    ],
    ids=["padding", "markers", "comments in a line", "spaces", "comments", "tags", "codestreams"],
)
def test_a_hostile_header_takes_no_second(file: bytes) -> None:
    start = time.process_time()
    assert problem(file, 1000)
    assert time.process_time() - start < 1
