"""The objects of an annotation that are used, and the faults of the others. No torch, no DALI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fasttricks.config import show_name
from fasttricks.data.boxes.annotation import Annotation, Marked

_NEAR = 1.0
"""Pixels by which a box may reach out of its image: tools differ on whether the first pixel is 0 or 1."""


class Kept(NamedTuple):
    """The boxes of an image that are used, and those that are odd, by the number of the object from 1."""

    xyxy: list[tuple[float, float, float, float]]
    labels: list[int]
    difficult: list[bool]
    left_out: dict[int, str]
    clamped: dict[int, str]


def usable(annotation: Annotation, numbers: Mapping[str, int]) -> Kept | str:
    """The boxes of an image, or why it is bad. numbers: of each class."""
    kept = Kept([], [], [], {}, {})
    for at, one in enumerate(annotation.objects, 1):
        if one.name not in numbers:
            return f"object {at} is of class {show_name(one.name)}, which is none of the classes trained on"
        x1, y1, x2, y2 = one.corners
        # also one pixel: no object is that small, and a click that was no drag leaves such a box
        if x2 <= x1 or y2 <= y1:
            kind = "is turned over" if x2 < x1 or y2 < y1 else "is empty"
            kept.left_out[at] = f"{_shown(one)} {kind}: xmax must be above xmin, and ymax above ymin"
            continue
        out = max(1 - x1, 1 - y1, x2 - annotation.width, y2 - annotation.height)
        size = f"the image of {annotation.width} x {annotation.height} pixels"
        if out > _NEAR:
            return f"object {at}: {_shown(one)} reaches {out:g} pixels out of {size}"
        if out > 0:
            kept.clamped[at] = f"{_shown(one)} reaches {out:g} pixels out of {size}"
        left, top = max(x1 - 1, 0.0), max(y1 - 1, 0.0)
        right, bottom = min(x2, float(annotation.width)), min(y2, float(annotation.height))
        if right <= left or bottom <= top:
            kept.left_out[at] = f"{_shown(one)} lies out of {size}"
            kept.clamped.pop(at, None)
            continue
        kept.xyxy.append((left, top, right, bottom))
        kept.labels.append(numbers[one.name])
        kept.difficult.append(one.difficult)
    return kept


def _shown(one: Marked) -> str:
    """A box, as it is written."""
    return f"box {' '.join(f'{corner:g}' for corner in one.corners)}"
