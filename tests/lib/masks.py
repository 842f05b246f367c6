"""Images with masks, drawn: a data set for segmentation in either layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

CLASSES = ("sky", "road", "car")


def folders(ade: bool, split: str) -> tuple[str, str]:
    """The folders of a split's images and masks."""
    name = {"train": "training", "val": "validation", "test": "testing"}[split]
    return (f"images/{name}", f"annotations/{name}") if ade else (f"{split}/images", f"{split}/masks")


def write_classes(root: Path, *, ade: bool, classes: Sequence[str] = CLASSES) -> None:
    """The file that names the classes."""
    if ade:
        rows = [f"{number}\t0.1\t1\t1\t{name}\n" for number, name in enumerate(classes, 1)]
        (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "".join(rows))
    else:
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))


def write_masks(
    root: Path,
    *,
    train: int,
    val: int,
    ade: bool = False,
    sides: tuple[int, int] = (20, 30),
    classes: Sequence[str] = CLASSES,
) -> Path:
    """A data set at `root`: noise with a colour for each class, in blocks of 4 pixels; its height and width from `sides`.

    A tenth of the blocks is ignored.
    """
    from PIL import Image  # a machine without the extras imports this file too

    draws = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    write_classes(root, ade=ade, classes=classes)
    for split, count in (("train", train), ("val", val)):
        images, masks = (root / folder for folder in folders(ade, split))
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            height, width = draws.integers(*sides, 2, endpoint=True)
            blocks = draws.integers(0, len(classes), (-(-height // 4), -(-width // 4)))
            labels = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
            hidden = (draws.random(blocks.shape) < 0.1).repeat(4, 0).repeat(4, 1)[:height, :width]
            pixels = draws.integers(0, 128, (height, width, 3)) + 100 * np.eye(3, dtype=int)[labels % 3]
            values = np.where(hidden, 0, labels + 1) if ade else np.where(hidden, 255, labels)
            Image.fromarray(pixels.astype(np.uint8)).save(images / f"{index:03d}.jpg", quality=90)
            Image.fromarray(values.astype(np.uint8)).save(masks / f"{index:03d}.png")
    return root
