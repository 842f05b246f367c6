"""The outlines of the demo data's ten classes, and of the pebbles about them: polygons from a numpy generator."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Outline = list[Array]  # polygons (points, 2) within about the unit disc: the shape, then the holes in it

TAU = 2 * math.pi


def polar(radius: Array | float, angle: Array) -> Array:
    """Points (N, 2) at these radii and angles (N,), radians."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius: float = 1.0) -> Array:
    return polar(radius, np.linspace(0, TAU, 90, endpoint=False))


def _cross(rng: np.random.Generator) -> Outline:
    a = rng.uniform(0.22, 0.34)
    x = [a, 1, 1, a, a, -a, -a, -1, -1, -a, -a, a]
    y = [a, a, -a, -a, -1, -1, -a, -a, a, a, 1, 1]
    return [np.array([x, y]).T]


def _crescent(rng: np.random.Generator) -> Outline:
    tip = rng.uniform(0.6, 0.9)  # angle of the two tips, from the axis of symmetry
    depth = rng.uniform(0.05, 0.3)  # where the inner arc crosses that axis
    outer = polar(1.0, np.linspace(tip, TAU - tip, 70))
    x, y = math.cos(tip), math.sin(tip)
    centre = (x * x + y * y - depth * depth) / (
        2 * (x + depth)
    )  # the centre of the arc through both tips and (-depth, 0)
    sweep = math.atan2(y, x - centre)
    inner = polar(centre + depth, np.linspace(TAU - sweep, sweep, 50)) + np.array([centre, 0])
    return [np.concatenate([outer, inner])]


def _disc(rng: np.random.Generator) -> Outline:
    return [_circle(rng.uniform(0.85, 1.0))]


def _flower(rng: np.random.Generator) -> Outline:
    angle = np.linspace(0, TAU, 180, endpoint=False)
    depth = rng.uniform(0.2, 0.3)
    petals = np.abs(np.cos(angle * rng.integers(5, 8) / 2)) ** 0.8
    return [polar(1 - 2 * depth + 2 * depth * petals, angle), _circle(rng.uniform(0.15, 0.22))]


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
    return [np.concatenate([polar(radius + half, angle), polar(radius - half, angle)[::-1]])]


def _square(rng: np.random.Generator) -> Outline:
    return [polar(rng.uniform(0.95, 1.1), np.arange(4) * TAU / 4)]


def _star(rng: np.random.Generator) -> Outline:
    points = 5
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.1, rng.uniform(0.38, 0.48))
    return [polar(radius, np.arange(2 * points) * TAU / (2 * points))]


def _triangle(rng: np.random.Generator) -> Outline:
    return [polar(rng.uniform(1.05, 1.2), np.arange(3) * TAU / 3)]


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


def pebble(rng: np.random.Generator) -> Outline:
    """A smooth blob of no class."""
    angle = np.linspace(0, TAU, 24, endpoint=False)
    radius = np.full_like(angle, 0.75)
    for waves in (2, 3):
        radius += rng.uniform(0.1, 0.25) / waves * np.cos(waves * angle + rng.uniform(0, TAU))
    return [polar(radius, angle) * (1, rng.uniform(0.45, 0.8))]
