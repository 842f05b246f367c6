"""Pictures of a detection: each image with its boxes, and a table of all boxes. fasttricks predict --draw DIR."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fasttricks.commands.drawn import free_name, pixels_of
from fasttricks.config import ConfigError, require, show_name
from fasttricks.reporting.examples import colors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fasttricks.commands.predict import PredictConfig
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World

BOXES = "boxes.csv"
"""The table of the boxes, in the folder of the pictures."""
LEAST_DRAWN = 0.5
"""Score from which on a box is drawn; the table has those of lower scores too."""
_SHOWN = 3
"""Boxes that are named of an image."""


class Box(NamedTuple):
    """A detection on an image of H x W pixels."""

    name: str
    """Its class."""
    score: float
    """0 to 1."""
    edges: tuple[float, float, float, float]
    """Left, top, right, bottom, in the pixels of the file's image, upright; 0 at its left and upper edge."""


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
        named = ", ".join(f"{box.name} {100 * box.score:.0f} %" for box in self.boxes[:_SHOWN])
        more = f" and {len(self.boxes) - _SHOWN} more" if len(self.boxes) > _SHOWN else ""
        return show_name(f"{self.path} -> {self.file}: {named or 'no box'}{more}")


def draw_boxes(saved: Saved, paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[DrawnBoxes]:
    """Make the folder config.draw with a picture of each image, one at a time, in the order given.

    DIR/NAME.png: the image with the boxes of a score of LEAST_DRAWN or more, each in the colour of its class, with its name and
    score. DIR/boxes.csv: all boxes, a row each, the surest of an image first. Detected as in validation. An image that cannot
    be read has an error. Raises ConfigError for a folder that is there or cannot be made.
    """
    from fasttricks.data.sources.decode import BadImage
    from fasttricks.learning.placement import place
    from fasttricks.learning.precision import check_precision, resolve_precision
    from fasttricks.system.determinism import ask_for_one_order

    rule = "has no effect in detection: the boxes of an image and its mirror image are not joined; leave it out"
    require(not config.flip, "flip", config.flip, rule)
    check_precision(config.precision, world.device)
    ask_for_one_order(world.device, on=True)
    precision = resolve_precision(config.precision, world.device)
    model = place(saved.trusting(config.trust_code).network(average=config.average), world, precision).eval()
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
            boxes = _boxes(model, image, saved, config, world)
            name = f"{free_name(Path(path).stem, taken)}.png"
            for box in boxes:
                edges = [f"{edge:.2f}" for edge in box.edges]
                rows.writerow([show_name(path), name, show_name(box.name), f"{box.score:.6f}", *edges])
            file.flush()
            drawn = [box for box in boxes if box.score >= LEAST_DRAWN]
            _picture(image, drawn, palette, folder / name)
            yield DrawnBoxes(path, folder / name, drawn)


def _make(given: str) -> Path:
    folder = Path(given)
    require(not os.path.lexists(folder), "draw", given, "already exists and is never overwritten; give another --draw")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"draw = {given!r}: must be a place to write to; give another ({error})") from error
    return folder


def _boxes(model: object, image: NDArray[np.uint8], saved: Saved, config: PredictConfig, world: World) -> list[Box]:
    """The detections on `image` (H, W, 3), the surest first."""
    from typing import cast

    import torch
    from torch import nn

    from fasttricks.data.annotated.pixels import normalise, resize
    from fasttricks.data.boxes.views import shown_size
    from fasttricks.learning.precision import image_dtype, make_autocast, resolve_precision
    from fasttricks.tasks.detection import detect

    precision = resolve_precision(config.precision, world.device)
    (height, width), dtype = image.shape[:2], image_dtype(precision, world.device)
    size = shown_size(height, width, saved.config.detect)
    pixels = resize(image, size, config.data).permute(1, 2, 0)[None].to(world.device)
    shown = normalise(pixels, config.data, dtype)
    (found,) = detect(cast(nn.Module, model), list(shown), make_autocast(precision, world.device))
    scale = torch.tensor([width / size[1], height / size[0]] * 2, device=world.device)
    columns = (found.labels.tolist(), found.scores.tolist(), (found.xyxy * scale).tolist())
    return [Box(saved.classes[label], score, tuple(edges)) for label, score, edges in zip(*columns, strict=True)]


def _picture(
    image: NDArray[np.uint8], boxes: Sequence[Box], palette: dict[str, tuple[int, int, int]], file: Path
) -> None:
    """The surest box last, so that it is on top."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    pen, line = ImageDraw.Draw(picture), max(1, round(max(image.shape) / 250))
    for box in reversed(boxes):
        color, label = palette[box.name], show_name(f"{box.name} {box.score:.2f}")
        left, top, right, bottom = box.edges
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=line)
        try:
            around = pen.textbbox((left + line, top + line), label)
        except UnicodeEncodeError:  # Pillow's built-in font, without freetype, has Latin letters alone
            label = f"{box.score:.2f}"
            around = pen.textbbox((left + line, top + line), label)
        pen.rectangle(around, fill=color)
        pen.text((left + line, top + line), label, fill=(0, 0, 0))
    picture.save(file)
