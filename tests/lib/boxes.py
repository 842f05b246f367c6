"""Images with boxes, drawn: a data set for detection in Pascal VOC's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("ball", "car", "tree")


def obj(name: str = "ball", box: Sequence[object] = (2, 3, 12, 14), *, difficult: object = 0, extra: str = "") -> str:
    """An element object, with corner pixels from 1; a corner that is None is left out."""
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inner = "".join(f"<{corner}>{value}</{corner}>" for corner, value in corners if value is not None)
    hard = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{hard}{extra}<bndbox>{inner}</bndbox></object>"


def annotation(*objects: str, size: tuple[object, object] | None = (30, 20), before: str = "") -> str:
    """An annotation. size: (width, height)."""
    sides = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"{before}<annotation><filename>elsewhere.png</filename>{sides}{''.join(objects)}</annotation>"


def write_boxes(
    root: Path,
    lists: Mapping[str, int],
    *,
    sides: tuple[int, int] = (20, 30),
    classes: Sequence[str] = CLASSES,
    most: int = 4,
) -> Path:
    """A VOCdevkit at `root`: noise, and for each object a rectangle in the colour of its class.

    lists: {"VOC2007/trainval": 4}: so many images in each list. sides: of the least to the largest height and width, pixels.
    An image has up to `most` objects, the first one of a list one at least; one in eight is difficult.
    """
    from PIL import Image  # a machine without the extras imports this file too

    draws = np.random.default_rng(0)
    for at, (path, count) in enumerate(lists.items()):
        year, _, name = path.partition("/")
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True, exist_ok=True)
        ids = [f"{at}{number:03d}" for number in range(count)]
        (root / year / "ImageSets/Main" / f"{name}.txt").write_text("".join(f"{one}\n" for one in ids))
        for index, one in enumerate(ids):
            height, width = draws.integers(*sides, 2, endpoint=True).tolist()
            pixels, objects = draws.integers(0, 128, (height, width, 3)), []
            for _ in range(max(int(index == 0), int(draws.integers(0, most, endpoint=True)))):
                left, top = draws.integers(0, width - 8), draws.integers(0, height - 8)
                right, bottom = draws.integers(left + 6, width + 1), draws.integers(top + 6, height + 1)
                label = int(draws.integers(len(classes)))
                pixels[top:bottom, left:right] = 100 * np.eye(3, dtype=int)[label % 3] + 100
                box: Any = (left + 1, top + 1, right, bottom)
                objects.append(obj(classes[label], box, difficult=int(draws.random() < 0.125)))
            Image.fromarray(pixels.astype(np.uint8)).save(root / year / "JPEGImages" / f"{one}.jpg", quality=90)
            (root / year / "Annotations" / f"{one}.xml").write_text(annotation(*objects, size=(width, height)))
    return root
