"""Pictures of a segmentation: each image under the colours of its classes, and its mask. fasttricks predict --draw DIR."""

from __future__ import annotations

import colorsys
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fasttricks.config import ConfigError, require, show_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from fasttricks.commands.predict import PredictConfig
    from fasttricks.learning.precision import Autocast
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World

MASKS, COLORS = "masks", "colors.csv"
"""The folder of the masks and the file of the colours, in that of the pictures."""
_SHOWN = 3
"""Classes that are named of an image."""


class Drawn(NamedTuple):
    """An image and the picture of it."""

    path: str
    file: Path | None
    """The picture; None where there is an error."""
    shares: list[tuple[str, float]]
    """The classes by their share of the pixels, the largest first, 0 to 1."""
    error: str = ""

    def __str__(self) -> str:
        """A line for people."""
        named = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares[:_SHOWN])
        return show_name(f"{self.path} -> {self.file}: {named}")


def colors(count: int) -> list[tuple[int, int, int]]:
    """A colour for each of `count` classes, 0 to 255: hues a golden ratio apart, in three depths."""
    depths = ((0.9, 0.95), (0.55, 0.8), (0.75, 0.5))
    found = [colorsys.hsv_to_rgb(k * 0.618034 % 1, *depths[k % 3]) for k in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in found]


def draw(saved: Saved, paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[Drawn]:
    """Make the folder config.draw with the picture and the mask of each image, one at a time, in the order given.

    DIR/NAME.png: the image at half its colours, and half those of its classes. DIR/masks/NAME.png: a palette PNG whose values are
    the classes, from 0 on. DIR/colors.csv: the class of each value, and its colour. An image is scored at its full size, as
    validation does. One that cannot be read has an error. Raises ConfigError for a folder that is there or cannot be made.
    """
    from fasttricks.data.annotated.pixels import normalise
    from fasttricks.data.masks.views import show_whole
    from fasttricks.data.sources.decode import BadImage
    from fasttricks.learning.placement import place
    from fasttricks.learning.precision import check_precision, image_dtype, make_autocast, resolve_precision
    from fasttricks.system.determinism import ask_for_one_order
    from fasttricks.training.checks import check_evaluation_size

    check_precision(config.precision, world.device)
    check_evaluation_size(saved, config.data.image_size)
    ask_for_one_order(world.device, on=True)
    precision = resolve_precision(config.precision, world.device)
    model = place(saved.network(average=config.average), world, precision)
    autocast, dtype = make_autocast(precision, world.device), image_dtype(precision, world.device)
    palette = colors(len(saved.classes))
    folder = _make(config.draw, saved.classes, palette)
    taken: set[str] = set()
    for path in paths:
        try:
            image = _pixels(path, config.data.max_pixels)
        except BadImage as error:
            yield Drawn(path, None, [], str(error))
            continue
        shown = normalise(show_whole(image, config.data)[None].to(world.device), config.data, dtype)
        classes = _classes(model, shown, image.shape[:2], saved, config, autocast)
        name = _free_name(Path(path).stem, taken)
        _write(folder, name, image, classes, palette)
        yield Drawn(path, folder / f"{name}.png", _shares(classes, saved.classes))


def _pixels(path: str, max_pixels: int) -> NDArray[np.uint8]:
    """(H, W, 3), RGB, upright. Raises BadImage."""
    import numpy as np

    from fasttricks.data.sources.decode import BadImage, decode
    from fasttricks.data.sources.errors import why_unreadable
    from fasttricks.data.sources.listed import Where, read_at

    try:
        return np.array(decode(read_at(Where(path)), max_pixels).convert("RGB"))
    except OSError as error:
        raise BadImage(why_unreadable(error)) from error


def _classes(
    model: nn.Module,
    images: Tensor,
    size: tuple[int, ...],
    saved: Saved,
    config: PredictConfig,
    autocast: Autocast,
) -> NDArray[np.uint8]:
    """(H, W): the likeliest class of each pixel."""
    import numpy as np

    from fasttricks.tasks.pixels import pixel_scores, resized_in_bands

    scales = saved.config.segment.test_scales
    scores = pixel_scores(model, images, scales=scales, flip=config.flip, autocast=autocast)
    bands = [band.argmax(1)[0].cpu().numpy() for _, band in resized_in_bands(scores, *size)]
    return np.concatenate(bands).astype(np.uint8)


def _make(place: str, classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> Path:
    folder = Path(place)
    require(not os.path.lexists(folder), "draw", place, "already exists and is never overwritten; give another --draw")
    try:
        (folder / MASKS).mkdir(parents=True)
        with open(folder / COLORS, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["value", "class", "red", "green", "blue"])
            rows.writerows([k, show_name(classes[k]), *palette[k]] for k in range(len(classes)))
    except OSError as error:
        raise ConfigError(f"draw = {place!r}: must be a place to write to; give another ({error})") from error
    return folder


def _free_name(stem: str, taken: set[str]) -> str:
    """`stem`, or with a number where an image of another folder has it."""
    name, number = stem, 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.casefold())
    return name


def _write(
    folder: Path,
    name: str,
    image: NDArray[np.uint8],
    classes: NDArray[np.uint8],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    from PIL import Image

    mask = Image.fromarray(classes).convert("P")
    mask.putpalette([value for color in palette for value in color])
    mask.save(folder / MASKS / f"{name}.png")
    Image.blend(Image.fromarray(image), mask.convert("RGB"), 0.5).save(folder / f"{name}.png")


def _shares(classes: NDArray[np.uint8], names: Sequence[str]) -> list[tuple[str, float]]:
    import numpy as np

    counts = np.bincount(classes.ravel(), minlength=len(names))
    order = (-counts).argsort(kind="stable")
    return [(names[k], int(counts[k]) / classes.size) for k in order.tolist() if counts[k]]
