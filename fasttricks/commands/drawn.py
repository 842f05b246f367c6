"""Pictures of a segmentation: each image under the colours of its classes, and its mask. fasttricks predict --draw DIR."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fasttricks.config import ConfigError, require, show_name
from fasttricks.reporting.examples import colors, masked, paint_classes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fasttricks.commands.predict import PredictConfig
    from fasttricks.config import DataConfig, Precision
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


def draw(saved: Saved, paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[Drawn]:
    """Make the folder config.draw with the picture and the mask of each image, one at a time, in the order given.

    DIR/NAME.png: the image at half its colours, and half those of its classes. DIR/masks/NAME.png: a palette PNG whose values are
    the classes, from 0 on. DIR/colors.csv: the class of each value, and its colour. An image is scored at its full size, as
    validation does. One that cannot be read has an error. Raises ConfigError for a folder that is there or cannot be made.
    """
    from fasttricks.data.sources.decode import BadImage

    classes_of = Segmenter(
        saved,
        world,
        config.data,
        precision=config.precision,
        average=config.average,
        flip=config.flip,
        trust_code=config.trust_code,
        scales=saved.config.segment.test_scales,
    )
    palette = colors(len(saved.classes))
    folder = _make(config.draw, saved.classes, palette)
    taken: set[str] = set()
    for path in paths:
        try:
            image = pixels_of(path, config.data.max_pixels)
        except BadImage as error:
            yield Drawn(path, None, [], str(error))
            continue
        classes = classes_of(image)
        name = free_name(Path(path).stem, taken)
        _write(folder, name, image, classes, palette)
        yield Drawn(path, folder / f"{name}.png", _shares(classes, saved.classes))


def pixels_of(path: str, max_pixels: int) -> NDArray[np.uint8]:
    """(H, W, 3), RGB, upright. Raises BadImage."""
    import numpy as np

    from fasttricks.data.sources.decode import BadImage, decode
    from fasttricks.data.sources.errors import why_unreadable
    from fasttricks.data.sources.listed import Where, read_at

    try:
        return np.array(decode(read_at(Where(path)), max_pixels).convert("RGB"))
    except OSError as error:
        raise BadImage(why_unreadable(error)) from error


class Segmenter:
    """The network of `saved`, and the likeliest class of each pixel by it, at the full size of an image as in validation.

    flip: as EvalConfig.flip. scales: as SegmentConfig.test_scales. Raises ConfigError for a
    precision that the device lacks and a size without effect.
    """

    def __init__(
        self,
        saved: Saved,
        world: World,
        data: DataConfig,
        *,
        precision: Precision,
        average: bool,
        flip: bool,
        trust_code: str,
        scales: Sequence[float],
    ) -> None:
        from fasttricks.learning.placement import place
        from fasttricks.learning.precision import check_precision, image_dtype, make_autocast, resolve_precision
        from fasttricks.system.determinism import ask_for_one_order
        from fasttricks.training.checks import check_evaluation_size

        check_precision(precision, world.device)
        saved = saved.trusting(trust_code)
        check_evaluation_size(saved, data.image_size)
        ask_for_one_order(world.device, on=True)
        resolved = resolve_precision(precision, world.device)
        self._model = place(saved.network(average=average), world, resolved)
        self._autocast, self._dtype = make_autocast(precision, world.device), image_dtype(precision, world.device)
        self._scales, self._flip = scales, flip
        self._device, self._data = world.device, data

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W), of an image (H, W, 3), RGB."""
        import numpy as np

        from fasttricks.data.annotated.pixels import normalise
        from fasttricks.data.masks.views import show_whole
        from fasttricks.tasks.pixels import pixel_scores, resized_in_bands

        shown = normalise(show_whole(image, self._data)[None].to(self._device), self._data, self._dtype)
        scores = pixel_scores(self._model, shown, scales=self._scales, flip=self._flip, autocast=self._autocast)
        bands = [band.argmax(1)[0].cpu().numpy() for _, band in resized_in_bands(scores, *image.shape[:2])]
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


def free_name(stem: str, taken: set[str]) -> str:
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

    masked(classes, palette).save(folder / MASKS / f"{name}.png")
    paint_classes(Image.fromarray(image), classes, palette).save(folder / f"{name}.png")


def _shares(classes: NDArray[np.uint8], names: Sequence[str]) -> list[tuple[str, float]]:
    import numpy as np

    counts = np.bincount(classes.ravel(), minlength=len(names))
    order = (-counts).argsort(kind="stable")
    return [(names[k], int(counts[k]) / classes.size) for k in order.tolist() if counts[k]]
