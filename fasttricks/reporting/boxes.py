"""Boxes of objects painted over an image: of predict --draw, and of the page of a detection. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fasttricks.config import show_name

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image, ImageDraw, ImageFont

    from fasttricks.reporting.examples import Color

    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
    Rect = tuple[int, int, int, int]  # left, top, right and bottom edge, pixels

_LINES, _LETTERS, _LEAST_LETTER = 250, 45, 10
"""Lines and letters that the longer side of an image is as long as; the least height of a letter, pixels."""


class Box(NamedTuple):
    """A detection on an image, or an object of its truth."""

    name: str
    """Its class."""
    edges: tuple[float, float, float, float]
    """Left, top, right, bottom, in pixels of the image, upright; 0 at its left and upper edge."""
    score: float | None = None
    """0 to 1; None: it is of the truth."""
    difficult: bool = False
    """As data.boxes.source.Boxes.difficult; it is dashed."""

    def scaled(self, across: float, down: float) -> Box:
        """The same on an image that is `across` times as wide and `down` times as high."""
        left, top, right, bottom = self.edges
        return self._replace(edges=(left * across, top * down, right * across, bottom * down))


def paint_boxes(image: Image.Image, boxes: Sequence[Box], palette: Mapping[str, Color]) -> Image.Image:
    """A copy of `image`, RGB, with `boxes`, the surest first, each with a label, in the colour that `palette` has for its class.

    A surer box is on top. A label lies within the image, along an edge of its box, where it covers no other label. Without such a
    place it covers as little as it can, and the surer label is on top. A name that is wider than the image is cut.
    """
    from PIL import ImageDraw

    picture, longer = image.copy(), max(image.size)
    pen, line = ImageDraw.Draw(picture), max(1, round(longer / _LINES))
    edges = [_whole(box, image.size) for box in boxes]
    for box, edge in reversed(list(zip(boxes, edges, strict=True))):
        _outline(pen, edge, palette[box.name], line, dashed=box.difficult)
    font, margin = _font(max(_LEAST_LETTER, round(longer / _LETTERS))), 1 + line // 2
    _, top, _, bottom = pen.textbbox((0, 0), "Ag", font=font)
    texts = [_fitting(pen, box, font, image.width - 2 * margin) for box in boxes]
    labels = [(round(pen.textlength(text, font)) + 2 * margin, round(bottom - top) + 2 * margin) for text in texts]
    places = place_labels(edges, labels, image.size)
    for box, text, (x, y, right, below) in reversed(list(zip(boxes, texts, places.tolist(), strict=True))):
        color = palette[box.name]
        pen.rectangle((x, y, right - 1, below - 1), fill=color)
        pen.text((x + margin, y + margin - top), text, fill=_ink(color), font=font)
    return picture


def place_labels(boxes: Sequence[Rect], labels: Sequence[tuple[int, int]], size: tuple[int, int]) -> NDArray[np.int64]:
    """(N, 4), edges in pixels: a place for the label of each of N boxes, as paint_boxes() says; earlier ones choose first.

    labels: width and height of each. size: width and height of the image. Cost: grows with N squared.
    """
    places = np.empty((0, 4), np.int64)
    for box, label in zip(boxes, labels, strict=True):
        places = np.concatenate([places, _free(box, label, size, places)])
    return places


def _font(letter: int) -> Font:
    """Pillow's own; without freetype it has one size alone."""
    from PIL import ImageFont, features

    return ImageFont.load_default(letter if features.check("freetype2") else None)


def _ink(color: Color) -> Color:
    """Black or white, by which can be read on `color`."""
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if bright > 127 else (255, 255, 255)


def _whole(box: Box, size: tuple[int, int]) -> Rect:
    """Its edges in whole pixels within an image of `size`, one apart at least."""
    (left, top), (right, bottom) = (
        [min(max(0, round(edge)), side) for edge, side in zip(edges, size, strict=True)]
        for edges in (box.edges[:2], box.edges[2:])
    )
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


def _outline(pen: ImageDraw.ImageDraw, edges: Rect, color: Color, line: int, *, dashed: bool) -> None:
    left, top, right, bottom = edges
    if not dashed:
        pen.rectangle((left, top, right - 1, bottom - 1), outline=color, width=line)
        return
    dash = 4 * line
    for x in range(left, right, 2 * dash):
        for y in (top, max(top, bottom - line)):
            pen.rectangle((x, y, min(x + dash, right) - 1, min(y + line, bottom) - 1), fill=color)
    for y in range(top, bottom, 2 * dash):
        for x in (left, max(left, right - line)):
            pen.rectangle((x, y, min(x + line, right) - 1, min(y + dash, bottom) - 1), fill=color)


def _fitting(pen: ImageDraw.ImageDraw, box: Box, font: Font, longest: int) -> str:
    """The class and the score, the former cut until both are `longest` pixels long at most."""
    name, score = show_name(box.name), "" if box.score is None else f" {box.score:.2f}"
    for letters in range(len(name), -1, -1):
        text = f"{name[:letters]}{'...' if letters < len(name) else ''}{score}"
        try:
            length = pen.textlength(text, font)
        except UnicodeEncodeError:  # Pillow's font without freetype has Latin letters alone
            text = text.encode("latin-1", "replace").decode("latin-1")
            length = pen.textlength(text, font)
        if length <= longest:
            break
    return text


def _free(box: Rect, label: tuple[int, int], size: tuple[int, int], taken: NDArray[np.int64]) -> NDArray[np.int64]:
    """(1, 4): the first place at an edge of `box` that is covered by none of `taken` (N, 4), else by the least of them."""
    corners = np.array(list(_corners(box, label, size)), np.int64)
    places = np.concatenate([corners, corners + label], 1)
    sides = [
        np.minimum(places[:, None, k + 2], taken[:, k + 2]) - np.maximum(places[:, None, k], taken[:, k])
        for k in (0, 1)
    ]
    covered = (sides[0].clip(0) * sides[1].clip(0)).sum(1)
    return places[[int(covered.argmin())]]


def _corners(box: Rect, label: tuple[int, int], size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Left upper corners of a label within an image of `size`, the best first: above `box`, in it, below it, beside it."""
    (left, top, right, bottom), (width, height) = box, label
    step, most_x, most_y = max(1, height // 2), max(0, size[0] - width), max(0, size[1] - height)
    across = [min(x, most_x) for x in range(left, max(left, right - width) + 1, step)]
    down = [min(y, most_y) for y in range(top, max(top, bottom - height) + 1, step)]
    rows = [y for y in (top - height, top, bottom, bottom - height) if 0 <= y <= most_y] or [min(top, most_y)]
    columns = [x for x in (right, left - width, left, right - width) if 0 <= x <= most_x] or [min(left, most_x)]
    yield from ((x, y) for y in rows for x in across)
    yield from ((x, y) for x in columns for y in down)
