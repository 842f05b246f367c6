"""How an image of the demo data is drawn: one of ten shapes, in any colour and texture, on a textured ground.

The class is the outline alone. Colour, texture, place, number, size, rotation and shear are random, and so are the
pebbles and strokes about it; a linear classifier of the pixels is near chance, and the shape survives flips and hues.

Whatever is smooth (grounds, fills, shadows, bevels) is made at 1/SHADE of the resolution and enlarged; only outlines
and grain are made at full size. Pure functions of a numpy generator; the folder of JPEGs is made by demo.py.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Array = NDArray[np.float64]
Outline = list[Array]  # polygons (points, 2) within about the unit disc: the shape, then the holes in it
Color = tuple[int, int, int]

SHORT_SIDE = (200, 500)
SHADE = 4  # smooth layers are drawn at 1/SHADE of the resolution
SHADOW = [round(0.55 * v) for v in range(256)]  # opacity of a shadow under a blurred outline
TAU = 2 * math.pi


def _polar(radius: Array | float, angle: Array) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius: float = 1.0) -> Array:
    return _polar(radius, np.linspace(0, TAU, 90, endpoint=False))


def _cross(rng: np.random.Generator) -> Outline:
    a = rng.uniform(0.22, 0.34)
    x = [a, 1, 1, a, a, -a, -a, -1, -1, -a, -a, a]
    y = [a, a, -a, -a, -1, -1, -a, -a, a, a, 1, 1]
    return [np.array([x, y]).T]


def _crescent(rng: np.random.Generator) -> Outline:
    tip = rng.uniform(0.6, 0.9)  # angle of the two tips, from the axis of symmetry
    depth = rng.uniform(0.05, 0.3)  # where the inner arc crosses that axis
    outer = _polar(1.0, np.linspace(tip, TAU - tip, 70))
    x, y = math.cos(tip), math.sin(tip)
    centre = (x * x + y * y - depth * depth) / (
        2 * (x + depth)
    )  # the centre of the arc through both tips and (-depth, 0)
    sweep = math.atan2(y, x - centre)
    inner = _polar(centre + depth, np.linspace(TAU - sweep, sweep, 50)) + np.array([centre, 0])
    return [np.concatenate([outer, inner])]


def _disc(rng: np.random.Generator) -> Outline:
    return [_circle(rng.uniform(0.85, 1.0))]


def _flower(rng: np.random.Generator) -> Outline:
    angle = np.linspace(0, TAU, 180, endpoint=False)
    depth = rng.uniform(0.2, 0.3)
    petals = np.abs(np.cos(angle * rng.integers(5, 8) / 2)) ** 0.8
    return [_polar(1 - 2 * depth + 2 * depth * petals, angle), _circle(rng.uniform(0.15, 0.22))]


def _heart(rng: np.random.Generator) -> Outline:
    t = np.linspace(0, TAU, 120, endpoint=False)
    x = 16 * np.sin(t) ** 3
    notch = rng.uniform(6, 7)
    y = 12 * np.cos(t) - notch * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([x, -y - 3], axis=1) / 15.5]


def _ring(rng: np.random.Generator) -> Outline:
    return [_circle(), _circle(rng.uniform(0.5, 0.75))]


def _spiral(rng: np.random.Generator) -> Outline:
    turns = rng.uniform(2.0, 2.6)
    angle = np.linspace(0.15 * TAU, turns * TAU, 150)
    radius = 0.86 * angle / angle[-1]
    half = rng.uniform(0.2, 0.27) * TAU * 0.86 / angle[-1] * np.linspace(0.6, 1, len(angle))
    return [np.concatenate([_polar(radius + half, angle), _polar(radius - half, angle)[::-1]])]


def _square(rng: np.random.Generator) -> Outline:
    return [_polar(rng.uniform(0.95, 1.1), np.arange(4) * TAU / 4)]


def _star(rng: np.random.Generator) -> Outline:
    points = 5
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.1, rng.uniform(0.38, 0.48))
    return [_polar(radius, np.arange(2 * points) * TAU / (2 * points))]


def _triangle(rng: np.random.Generator) -> Outline:
    return [_polar(rng.uniform(1.05, 1.2), np.arange(3) * TAU / 3)]


SHAPES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "flower": _flower,
    "heart": _heart,
    "ring": _ring,
    "spiral": _spiral,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}


def _pebble(rng: np.random.Generator) -> Outline:
    """A smooth blob of no class, strewn over the ground."""
    angle = np.linspace(0, TAU, 40, endpoint=False)
    radius = np.full_like(angle, 0.75)
    for waves in (2, 3):
        radius += rng.uniform(0.1, 0.25) / waves * np.cos(waves * angle + rng.uniform(0, TAU))
    return [_polar(radius, angle) * (1, rng.uniform(0.45, 0.8))]


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


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Smooth noise of mean 0 and std about 1, (height, width), with about `cells` (across, down) bumps."""
    grid = Image.fromarray(rng.standard_normal((cells[1] + 1, cells[0] + 1), dtype=np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)


def _texture(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """A random pattern within 0 to 1, (height, width): a gradient, clouds, grain or waves."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    angle = rng.uniform(0, TAU)
    along = math.cos(angle) * x + math.sin(angle) * y
    kind = rng.integers(4)
    field: Array
    if kind == 0:
        field = 4 * along + 0.3 * _noise(rng, size, (5, 5))
    elif kind == 1:
        field = np.sum([_noise(rng, size, (cells, cells)) / cells**0.5 for cells in (2, 5, 11, 23)], axis=0)
    elif kind == 2:
        fine, coarse = int(rng.integers(30, 60)), int(rng.integers(1, 5))
        field = _noise(rng, size, (fine, coarse) if rng.random() < 0.5 else (coarse, fine)) + _noise(rng, size, (3, 3))
    else:
        field = np.sin(TAU * rng.uniform(4, 14) * along + rng.uniform(0, 2) * _noise(rng, size, (4, 4)))
    field -= field.min()
    field /= max(field.max(), 1e-6)
    return field


def _blend(a: Color, b: Color, amount: Array) -> Array:
    """Colours (height, width, 3), 0 to 255: a where amount is 0, b where it is 1."""
    return np.asarray(a) + amount[..., None] * (np.asarray(b, dtype=np.float64) - a)


def _enlarge(shade: Array, size: tuple[int, int]) -> Image.Image:
    small = Image.fromarray(np.clip(shade, 0, 255).astype(np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, float]:
    """A textured ground and its mean luma."""
    first = _color(rng, (0.05, 0.6), (0.25, 0.95))
    second = _color(rng, (0.05, 0.6), (0.25, 0.95))
    share = rng.uniform(0.25, 0.7)  # how far towards the second colour the texture goes
    small = (-(-size[0] // SHADE), -(-size[1] // SHADE))
    shade = _blend(first, second, share * _texture(rng, small))
    ground = _enlarge(shade, size)
    return ground, float(shade.mean(axis=(0, 1)) @ (0.299, 0.587, 0.114))


def _place(rng: np.random.Generator, outline: Outline, centre: tuple[float, float], radius: float) -> Outline:
    """The outline in pixels: rotated by any angle, sheared and squeezed a little, moved to `centre`."""
    angle = rng.uniform(0, TAU)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    view = np.array([[1, rng.uniform(-0.1, 0.1)], [0, rng.uniform(0.88, 1)]])
    turn = rng.uniform(0, TAU)
    tilt = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = tilt @ view @ rotation * radius
    return [points @ matrix.T + centre for points in outline]


def _draw(
    rng: np.random.Generator, image: Image.Image, outline: Outline, radius: float, color: Color, lift: float
) -> None:
    """Paint one solid onto `image`, in place: its shadow, then its texture under a bevel lit from the upper left.

    lift: height above the ground as a share of the radius, which sets shadow and bevel.
    """
    margin = radius * (0.1 + lift)
    left, top = (int(v) for v in np.floor(outline[0].min(axis=0) - margin))
    right, bottom = (int(v) for v in np.ceil(outline[0].max(axis=0) + margin))
    small = (-(-(right - left) // SHADE), -(-(bottom - top) // SHADE))
    size = (small[0] * SHADE, small[1] * SHADE)

    mask = Image.new("L", (2 * size[0], 2 * size[1]))
    pen = ImageDraw.Draw(mask)
    for index, points in enumerate(outline):
        pen.polygon([(x, y) for x, y in 2 * (points - (left, top))], fill=0 if index else 255)
    mask = mask.reduce(2)

    low = mask.reduce(SHADE)
    blur = max(0.6, radius * lift / SHADE)
    soft = low.filter(ImageFilter.GaussianBlur(blur))
    shift = round(blur)
    shadow = Image.new("L", small)
    shadow.paste(soft.point(SHADOW), (shift, shift))
    image.paste((0, 0, 0), (left, top), shadow.resize(size, Image.Resampling.BILINEAR))

    height = np.asarray(low.filter(ImageFilter.GaussianBlur(max(0.6, blur / 2))), dtype=np.float64)
    step = max(1, shift // 2)
    bevel = height - np.roll(height, (step, step), axis=(0, 1))
    other = tuple(int(np.clip(v + rng.uniform(-60, 60), 0, 255)) for v in color)
    fill = _blend(color, (other[0], other[1], other[2]), _texture(rng, small)) + 0.4 * bevel[..., None]
    image.paste(_enlarge(fill, size), (left, top), mask)


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
    for _ in range(rng.integers(0, 6)):
        centre = rng.uniform(0, image.width), rng.uniform(0, image.height)
        radius = short * rng.uniform(0.03, 0.08)
        _draw(rng, image, _place(rng, _pebble(rng), centre, radius), radius, _contrasting(rng, ground, 25), 0.1)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        x, y, angle = rng.uniform(0, image.width), rng.uniform(0, image.height), rng.uniform(0, TAU)
        bend = np.linspace(0, rng.uniform(-1.5, 1.5), 16)
        length = short * rng.uniform(0.2, 0.6) / 16
        path = np.cumsum(_polar(length, angle + bend), axis=0) + np.array([x, y])
        pen.line([(px, py) for px, py in path], fill=_contrasting(rng, ground, 25), width=int(rng.integers(1, 5)))


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height, pixels: short side log-uniform over SHORT_SIDE, long side up to 1.6 times it, either way up."""
    short = math.exp(rng.uniform(math.log(SHORT_SIDE[0]), math.log(SHORT_SIDE[1])))
    aspect = rng.choice([1.0, 4 / 3, 1.5]) if rng.random() < 0.5 else rng.uniform(1, 1.6)
    size = round(short), round(short * aspect)
    return size if rng.random() < 0.3 else size[::-1]


def draw_image(rng: np.random.Generator, name: str) -> Image.Image:
    """One RGB image of the class `name`, a key of SHAPES, wholly determined by `rng`; about 12 ms of one core."""
    size = _size(rng)
    image, ground = _ground(rng, size)
    _strew(rng, image, ground)
    color = _contrasting(rng, ground)
    centres, radius = _centres(rng, size)
    for centre in centres:
        _draw(rng, image, _place(rng, SHAPES[name](rng), centre, radius), radius, color, rng.uniform(0.04, 0.12))
        color = color if rng.random() < 0.5 else _contrasting(rng, ground)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.2)))
    grain = rng.standard_normal((size[1], size[0]), dtype=np.float32) * np.float32(rng.uniform(0, 8)) + 128
    gray = Image.fromarray(grain.astype(np.uint8))
    return ImageChops.add(image, Image.merge("RGB", (gray, gray, gray)), offset=-128)
