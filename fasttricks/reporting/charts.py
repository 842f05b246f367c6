"""Small charts as SVG and pictures as data URIs, in the colours of the page (page.html)."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray
from PIL import Image

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 420, 240, 52, 34, 12, 12
_HEAT_SIDE = 720
"""Pixels of the side of a heat map, at most; a class has one at least."""


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, *, from_zero: bool = False) -> str:
    """An SVG of up to four lines over one x axis; empty without a finite point.

    The labels are the program's own words. The names of the lines may be anyone's: a record names the scores of its run.
    """
    finite = [Line(line.name, [p for p in line.points if all(map(math.isfinite, p))]) for line in lines]
    points = [point for line in finite for point in line.points]
    if not points:
        return ""
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = _ticks(0 if from_zero else min(y for _, y in points), max(y for _, y in points))
    parts = [_axes(x_ticks, y_ticks, x_label, y_label)]
    for number, line in enumerate(finite):
        path = " ".join(f"{_x(x, x_ticks):.1f},{_y(y, y_ticks):.1f}" for x, y in line.points)
        if len(line.points) == 1:
            x, y = path.split(",")
            parts.append(f'<circle class="line{number}" cx="{x}" cy="{y}" r="3"/>')
        parts.append(f'<polyline class="line{number}" points="{path}"/>')
    names = ", ".join(line.name for line in finite)
    return _svg("".join(parts), escape(f"{names} by {x_label}"))


def reliability_chart(count: Sequence[int], right: Sequence[int], confidence: Sequence[float]) -> str:
    """An SVG of the accuracy in each bin of confidence, of equal width, beside the diagonal of a calibrated network."""
    bins, ticks = len(count), [0.0, 0.25, 0.5, 0.75, 1.0]
    parts, width = [_axes(ticks, ticks, "confidence", "accuracy")], 1 / bins
    for b in range(bins):
        if count[b]:
            accuracy, left = right[b] / count[b], _x(b * width, ticks)
            top, base = _y(accuracy, ticks), _y(0, ticks)
            size = _x((b + 1) * width, ticks) - left - 1
            title = f"confidence {confidence[b] / count[b]:.3f}, accuracy {accuracy:.3f}, {count[b]:,} images"
            parts.append(
                f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{size:.1f}" height="{base - top:.1f}">'
            )
            parts.append(f"<title>{title}</title></rect>")
    ends = f'x1="{_x(0, ticks)}" y1="{_y(0, ticks)}" x2="{_x(1, ticks)}" y2="{_y(1, ticks)}"'
    parts.append(f'<line class="ideal" {ends}/>')
    return _svg("".join(parts), "accuracy by confidence; the dashed diagonal is a calibrated network")


def _svg(content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{content}</svg>'


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> str:
    parts, base, end = [], _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for tick in y_ticks:
        y = _y(tick, y_ticks)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{_x(tick, x_ticks):.1f}" y="{base + 16}" text-anchor="middle">{_label(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + end) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{x_label}</text>')
    middle = (_TOP + base) / 2
    parts.append(f'<text transform="rotate(-90)" x="{-middle}" y="11" text-anchor="middle">{y_label}</text>')
    return "".join(parts)


def _x(value: float, ticks: Sequence[float]) -> float:
    return _LEFT + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, ticks: Sequence[float]) -> float:
    return _HEIGHT - _BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (_HEIGHT - _BOTTOM - _TOP)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to seven of them, around the range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def heat_map(confusion: NDArray[np.int64]) -> str:
    """The confusion matrix (K, K) as a PNG in a data URI: each row's shares, the darker the larger, by their square root."""
    shares = np.sqrt(confusion / np.maximum(confusion.sum(1, keepdims=True), 1))
    picture = Image.fromarray((255 - np.round(235 * shares)).astype(np.uint8), "L")
    if len(confusion) > _HEAT_SIDE:
        picture = picture.resize((_HEAT_SIDE, _HEAT_SIDE), Image.Resampling.BOX)
    return data_uri(picture, "PNG")


def data_uri(picture: Image.Image, kind: str, **options: int) -> str:
    """`picture` as a data URI of a PNG or JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
