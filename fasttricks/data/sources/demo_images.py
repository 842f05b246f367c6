"""How an image of the demo data is drawn: one of ten shapes, in any colour and texture, on a textured ground.

The class is the outline alone. Colour, texture, place, number, size, rotation and shear are random, and so are the
pebbles and strokes about it; a linear classifier of the pixels is near chance, and the shape survives flips and hues.

Whatever is smooth (grounds, fills, shadows, bevels) is made at 1/SHADE of the resolution and enlarged; only outlines
and grain are made at full size. Pure functions of a numpy generator; the folder of JPEGs is made by demo.py.
"""

from __future__ import annotations

import colorsys
import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fasttricks.data.sources.demo_shapes import SHAPES, TAU, Outline, pebble, polar

Shade = NDArray[np.float32]
Color = tuple[int, int, int]

SHORT_SIDE = (200, 500)
SHADE = 6  # smooth layers are drawn at 1/SHADE of the resolution
SHADOW = 0.55  # opacity of a shadow under a blurred outline
GRAIN = 1000  # side of the noise that every image takes a part of; the longest image has 800


def _luma(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _color(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Color:
    hsv = rng.uniform(), rng.uniform(*saturation), rng.uniform(*value)
    r, g, b = (round(255 * channel) for channel in colorsys.hsv_to_rgb(*hsv))
    return r, g, b


def _contrasting(rng: np.random.Generator, ground: float, gap: float = 60) -> Color:
    """A colour at least `gap` of 255 lighter or darker than a ground of luma `ground`: visible whatever its hue."""
    while True:
        color = _color(rng, (0.2, 0.95), (0.25, 1.0))
        if abs(_luma(color) - ground) >= gap:
            return color


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> Shade:
    """Smooth noise of mean 0 and std about 1, (height, width), with about `cells` (across, down) bumps."""
    grid = Image.fromarray(rng.standard_normal((cells[1] + 1, cells[0] + 1), dtype=np.float32))
    return np.array(grid.resize(size, Image.Resampling.BICUBIC))


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> Shade:
    """A random pattern within 0 to 1, (height, width): a gradient, clouds, grain or waves."""
    width, height = size
    angle = rng.uniform(0, TAU)
    x = np.arange(width, dtype=np.float32) * np.float32(math.cos(angle) / max(size))
    y = np.arange(height, dtype=np.float32) * np.float32(math.sin(angle) / max(size))
    along = x + y[:, None]
    kind = rng.integers(4)
    field: Shade
    if kind == 0:
        field = 4 * along + 0.3 * _noise(rng, size, (5, 5))
    elif kind == 1:
        field = sum(
            (_noise(rng, size, (cells, cells)) / cells**0.5 for cells in (5, 11, 23)), _noise(rng, size, (2, 2))
        )
    elif kind == 2:
        fine, coarse = int(rng.integers(30, 60)), int(rng.integers(1, 5))
        field = _noise(rng, size, (fine, coarse) if rng.random() < 0.5 else (coarse, fine)) + _noise(rng, size, (3, 3))
    else:
        field = np.sin(TAU * rng.uniform(4, 14) * along + rng.uniform(0, 2) * _noise(rng, size, (4, 4)))
    field -= field.min()
    field /= max(field.max(), 1e-6)
    return field


def _enlarge(shade: Shade, size: tuple[int, int]) -> Image.Image:
    """Colours (height / SHADE, width / SHADE, 3), rounded up, 0 to 255, as an RGB image of `size`."""
    small = Image.fromarray(shade.clip(0, 255).astype(np.uint8))
    return small.resize(size, Image.Resampling.BILINEAR, box=(0, 0, size[0] / SHADE, size[1] / SHADE))


def _shifted(shade: Shade, step: int) -> Shade:
    """`shade` (height, width) moved down and to the right, zeros behind it."""
    moved = np.zeros_like(shade)
    moved[step:, step:] = shade[:-step, :-step]
    return moved


def _blurred(low: Image.Image, radius: float) -> Shade:
    return np.asarray(low.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)


def _place(rng: np.random.Generator, outline: Outline, centre: tuple[float, float], radius: float) -> Outline:
    """The outline in pixels: rotated by any angle, sheared and squeezed a little, moved to `centre`."""
    angle = rng.uniform(0, TAU)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    view = np.array([[1, rng.uniform(-0.1, 0.1)], [0, rng.uniform(0.88, 1)]])
    turn = rng.uniform(0, TAU)
    tilt = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = tilt @ view @ rotation * radius
    return [points @ matrix.T + centre for points in outline]


def _nearest(centres: list[tuple[float, float]], small: tuple[int, int]) -> NDArray[np.intp]:
    """The number of the centre, in pixels, that is nearest to each pixel of the layers at 1/SHADE: (height, width), or (1, 1)."""
    if len(centres) == 1:
        return np.zeros((1, 1), dtype=np.intp)
    across = np.arange(small[0], dtype=np.float32) * SHADE
    down = np.arange(small[1], dtype=np.float32) * SHADE
    nearest: NDArray[np.intp] = np.argmin([(across - x) ** 2 + ((down - y) ** 2)[:, None] for x, y in centres], axis=0)
    return nearest


def _centres(rng: np.random.Generator, size: tuple[int, int]) -> tuple[list[tuple[float, float]], float]:
    """Where the shapes stand, and their radius: one large, near the middle, or a loose grid of small ones."""
    width, height = size
    short = min(size)
    if rng.random() < 0.65:
        radius = short * rng.uniform(0.32, 0.44)
        play = 0.47 * short - radius
        return [(width / 2 + rng.uniform(-play, play), height / 2 + rng.uniform(-play, play))], radius
    across, down = max(2, round(2 * width / short)), max(2, round(2 * height / short))
    cell = (width / across, height / down)
    radius = min(cell) * rng.uniform(0.36, 0.44)
    play_x, play_y = (max(0.0, side / 2 - radius) for side in cell)
    return [
        ((i + 0.5) * cell[0] + rng.uniform(-play_x, play_x), (j + 0.5) * cell[1] + rng.uniform(-play_y, play_y))
        for j in range(down)
        for i in range(across)
    ], radius


def _strew(rng: np.random.Generator, image: Image.Image, ground: float) -> None:
    """Pebbles and strokes on the ground, which say nothing about the class; in place."""
    short = min(image.size)
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(0, 5)):
        centre = rng.uniform(0, image.width), rng.uniform(0, image.height)
        radius = short * rng.uniform(0.03, 0.08)
        (outline,) = _place(rng, pebble(rng), centre, radius)
        lit = centre + 0.6 * (outline - centre) - 0.2 * radius
        for points, fill in (
            (outline + 0.25 * radius, (0, 0, 0, 90)),
            (outline, _contrasting(rng, ground, 25)),
            (lit, (255, 255, 255, 60)),
        ):
            pen.polygon(points.ravel().tolist(), fill=fill)
    for _ in range(rng.integers(0, 4)):
        x, y, angle = rng.uniform(0, image.width), rng.uniform(0, image.height), rng.uniform(0, TAU)
        bend = np.linspace(0, rng.uniform(-1.5, 1.5), 16)
        length = short * rng.uniform(0.2, 0.6) / 16
        path = np.cumsum(polar(length, angle + bend), axis=0) + np.array([x, y])
        pen.line(path.ravel().tolist(), fill=_contrasting(rng, ground, 25), width=int(rng.integers(1, 5)))


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height, pixels: short side log-uniform over SHORT_SIDE, long side up to 1.6 times it, either way up."""
    short = math.exp(rng.uniform(math.log(SHORT_SIDE[0]), math.log(SHORT_SIDE[1])))
    aspect = rng.choice([1.0, 4 / 3, 1.5]) if rng.random() < 0.5 else rng.uniform(1, 1.6)
    size = round(short), round(short * aspect)
    return size if rng.random() < 0.3 else size[::-1]


@functools.cache
def _grain() -> NDArray[np.int16]:
    """Normal noise of std 256, (side, 3 x side), the same of red, green and blue. To draw it for each image takes longer."""
    noise = np.random.default_rng(0).normal(0, 256, (GRAIN, GRAIN)).clip(-1000, 1000)
    return noise.astype(np.int16).repeat(3, axis=1)


def _grained(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """`image` with noise of a random strength, as of a sensor."""
    left, top = (int(rng.integers(0, GRAIN - side + 1)) for side in image.size)
    part = _grain()[top : top + image.height, 3 * left : 3 * (left + image.width)]
    noisy = part * np.int16(rng.integers(0, 33))  # std 0 to 8, in units of 1/1024
    noisy >>= 10
    noisy += np.asarray(image).reshape(noisy.shape)
    np.clip(noisy, 0, 255, out=noisy)
    return Image.fromarray(noisy.astype(np.uint8).reshape(image.height, image.width, 3))


def draw_image(rng: np.random.Generator, name: str) -> Image.Image:
    """One RGB image of the class `name`, a key of SHAPES, wholly determined by `rng`."""
    size = _size(rng)
    small = -(-size[0] // SHADE), -(-size[1] // SHADE)
    centres, radius = _centres(rng, size)

    mask = Image.new("L", (2 * size[0], 2 * size[1]))
    pen = ImageDraw.Draw(mask)
    for centre in centres:
        for index, points in enumerate(_place(rng, SHAPES[name](rng), centre, radius)):
            pen.polygon((2 * points).ravel().tolist(), fill=0 if index else 255)
    mask = mask.reduce(2)
    low = mask.reduce(SHADE)
    blur = max(
        0.6, radius * rng.uniform(0.04, 0.12) / SHADE
    )  # a shape's height over the ground, which sets shadow and bevel
    shift = max(1, round(blur))
    shadow = _shifted(_blurred(low, blur), shift)
    height = _blurred(low, max(0.6, blur / 2))
    bevel = height - _shifted(height, max(1, shift // 2))  # lit from the upper left

    first, second = (np.array(_color(rng, (0.05, 0.6), (0.25, 0.95)), dtype=np.float32) for _ in range(2))
    share = np.float32(rng.uniform(0.25, 0.7))  # how far towards the second colour the texture goes
    ground = first + (share * _texture(rng, small))[..., None] * (second - first)
    luma = float(ground.mean(axis=(0, 1)) @ (0.299, 0.587, 0.114))
    image = _enlarge(ground * (1 - SHADOW / 255 * shadow)[..., None], size)
    _strew(rng, image, luma)

    colors = [_contrasting(rng, luma)]
    while len(colors) < len(centres):
        colors.append(colors[-1] if rng.random() < 0.5 else _contrasting(rng, luma))
    own = np.array(colors, dtype=np.float32)
    other = (own + rng.uniform(-60, 60, own.shape).astype(np.float32)).clip(0, 255)
    which = _nearest(centres, small)
    fill = _texture(rng, small)[..., None] * (other - own)[which]
    fill += own[which]
    fill += (np.float32(0.4) * bevel)[..., None]
    left, top, right, bottom = mask.getbbox() or (0, 0, *size)
    left, top = left - left % SHADE, top - top % SHADE
    part = fill[top // SHADE : -(-bottom // SHADE), left // SHADE : -(-right // SHADE)]
    image.paste(_enlarge(part, (right - left, bottom - top)), (left, top), mask.crop((left, top, right, bottom)))
    return _grained(rng, image)
