"""Pictures of a detection: each image with its boxes, and a table of all boxes. fasttricks predict --draw DIR."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fasttricks.commands.drawn import free_name, pixels_of
from fasttricks.config import ConfigError, require, show_name
from fasttricks.reporting.boxes import Box, paint_boxes
from fasttricks.reporting.examples import colors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fasttricks.commands.network_config import NetworkConfig
    from fasttricks.commands.predict import PredictConfig
    from fasttricks.config import DetectConfig
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World
    from fasttricks.tasks.average_precision import Found

BOXES = "boxes.csv"
"""The table of the boxes, in the folder of the pictures."""
_SHOWN = 3
"""Boxes that are named of an image."""


class DrawnBoxes(NamedTuple):
    """An image and the picture of it."""

    path: str
    file: Path | None
    """The picture; None where there is an error."""
    boxes: list[Box]
    """Those that are drawn, the surest first."""
    error: str = ""

    def __str__(self) -> str:
        """A line for people."""
        named = ", ".join(f"{box.name} {100 * (box.score or 0):.0f} %" for box in self.boxes[:_SHOWN])
        more = f" and {len(self.boxes) - _SHOWN} more" if len(self.boxes) > _SHOWN else ""
        return show_name(f"{self.path} -> {self.file}: {named or 'no box'}{more}")


def draw_boxes(saved: Saved, paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[DrawnBoxes]:
    """Make the folder config.draw with a picture of each image, one at a time, in the order given.

    DIR/NAME.png: the image with the boxes of a score of config.draw_score or more, as paint_boxes(). DIR/boxes.csv: all boxes, a
    row each, the surest of an image first. Detected as in validation. An image that cannot be read has an error. Raises
    ConfigError for a folder that is there or cannot be made.
    """
    from PIL import Image

    from fasttricks.data.sources.decode import BadImage

    rule = "has no effect in detection: the boxes of an image and its mirror image are not joined; leave it out"
    require(not config.flip, "flip", config.flip, rule)
    find = Finder(saved, world, config, saved.config.detect)
    palette = dict(zip(saved.classes, colors(len(saved.classes)), strict=True))
    folder = _make(config.draw)
    taken: set[str] = set()
    with open(folder / BOXES, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "picture", "class", "score", "left", "top", "right", "bottom"])
        for path in paths:
            try:
                image = pixels_of(path, config.data.max_pixels)
            except BadImage as error:
                yield DrawnBoxes(path, None, [], str(error))
                continue
            boxes = boxes_of(find(image), saved.classes)
            name = f"{free_name(Path(path).stem, taken)}.png"
            for box in boxes:
                edges = [f"{edge:.2f}" for edge in box.edges]
                rows.writerow([show_name(path), name, show_name(box.name), f"{box.score:.6f}", *edges])
            file.flush()
            drawn = [box for box in boxes if box.score is not None and box.score >= config.draw_score]
            paint_boxes(Image.fromarray(image), drawn, palette).save(folder / name)
            yield DrawnBoxes(path, folder / name, drawn)


def _make(given: str) -> Path:
    folder = Path(given)
    require(not os.path.lexists(folder), "draw", given, "already exists and is never overwritten; give another --draw")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"draw = {given!r}: must be a place to write to; give another ({error})") from error
    return folder


class Finder:
    """The network of `saved`, and its detections on an image as in validation, by the fields of `detect`.

    Raises ConfigError for a precision that the device lacks.
    """

    def __init__(self, saved: Saved, world: World, config: NetworkConfig, detect: DetectConfig) -> None:
        from fasttricks.learning.placement import place
        from fasttricks.learning.precision import check_precision, image_dtype, make_autocast, resolve_precision
        from fasttricks.system.determinism import ask_for_one_order

        check_precision(config.precision, world.device)
        ask_for_one_order(world.device, on=True)
        saved = dataclasses.replace(saved, config=dataclasses.replace(saved.config, detect=detect))
        precision = resolve_precision(config.precision, world.device)
        model = saved.trusting(config.trust_code).network(average=config.average)
        self._model, self._device = place(model, world, precision).eval(), world.device
        self._autocast, self._dtype = make_autocast(precision, world.device), image_dtype(precision, world.device)
        self._data, self._detect = config.data, detect

    def __call__(self, image: NDArray[np.uint8]) -> Found:
        """The detections on an image (H, W, 3), RGB, in its pixels, the surest first; on the host."""
        import torch

        from fasttricks.data.annotated.pixels import normalise, resize
        from fasttricks.data.boxes.views import shown_size
        from fasttricks.tasks.average_precision import Found
        from fasttricks.tasks.detection import detect

        height, width = image.shape[:2]
        size = shown_size(height, width, self._detect)
        pixels = resize(image, size, self._data).permute(1, 2, 0)[None].to(self._device)
        (found,) = detect(self._model, list(normalise(pixels, self._data, self._dtype)), self._autocast)
        scale = torch.tensor([width / size[1], height / size[0]] * 2)
        return Found(found.xyxy.cpu() * scale, found.scores.cpu(), found.labels.cpu())


def boxes_of(found: Found, classes: Sequence[str]) -> list[Box]:
    """`found` in plain values."""
    columns = (found.labels.tolist(), found.scores.tolist(), found.xyxy.tolist())
    return [Box(classes[label], tuple(edges), score) for label, score, edges in zip(*columns, strict=True)]
