"""The page of each task that report has one of: the facts of its answers, beside those of the run. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from fasttricks.config import UserError
from fasttricks.system.reading import is_there

if TYPE_CHECKING:
    from fasttricks.commands.drawn_boxes import Finder
    from fasttricks.commands.evaluate import Evaluated
    from fasttricks.commands.report import ReportConfig
    from fasttricks.config import DataConfig
    from fasttricks.data.boxes.source import BoxSource
    from fasttricks.data.masks.source import MaskSource
    from fasttricks.reporting.examples import Example
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World


class Reported(NamedTuple):
    """A checkpoint whose page is to be made."""

    saved: Saved
    config: ReportConfig
    found: Evaluated
    folder: Path | None
    """Its run folder."""
    device: World
    """The process alone, on the device that evaluated."""
    run: Mapping[str, Any]
    """The fields of reporting.page.RunFacts."""
    headline: Sequence[tuple[str, str]]
    """The metrics and the loss."""
    counts: Sequence[tuple[str, str]]
    """The number of images and of classes."""


def class_page(reported: Reported) -> str:
    """The page of a classifier. Lists the training images."""
    from fasttricks.reporting.page import Facts, page

    saved, config, found = reported.saved, reported.config, reported.found
    undecided = int(found.answers.undecided.sum())
    notes = [f"{undecided:,} images have a NaN among their logits; they count as wrong."] if undecided else []
    ece = ("ECE", f"{100 * found.answers.ece:.2f} %")
    facts = Facts(
        **reported.run,
        headline=[*reported.headline, ece, *reported.counts],
        notes=notes,
        answers=found.answers,
        images=found.images,
        max_pixels=config.data.max_pixels,
        train_counts=_train_counts(config.data, saved),
        calibration=_calibration(reported),
    )
    return page(facts)


def _calibration(reported: Reported) -> Any:
    from fasttricks.commands.calibrated import stored_calibration

    saved, config, folder = reported.saved, reported.config, reported.folder
    if folder is None or not is_there(folder / "calibration.json"):
        return None
    try:
        network = saved.trusting(config.trust_code).network(average=config.average)
        return stored_calibration(saved, network, average=config.average)
    except UserError:
        return None  # of other weights: the page says that these have none


def _train_counts(data: DataConfig, saved: Saved) -> list[int] | None:
    """Training images of each class, in the checkpoint's order; None where the data has none, or others."""
    from fasttricks.data.sources import find_dataset
    from fasttricks.data.sources.class_counts import class_counts

    try:
        train, _ = find_dataset(data)
    except (UserError, OSError):
        return None
    counts = dict(zip(train.classes, class_counts(train).tolist(), strict=True))
    return [counts[name] for name in saved.classes] if counts.keys() == set(saved.classes) else None


def pixel_page(reported: Reported) -> str:
    """The page of a segmentation. Asks the network again for the images that it shows, 18 at most."""
    from fasttricks.commands.drawn import Segmenter
    from fasttricks.reporting.examples import pick
    from fasttricks.reporting.pixel_page import PixelFacts, pixel_page

    config, scores, source = reported.config, reported.found.answers, cast("MaskSource", reported.found.images)
    classes_of = Segmenter(
        reported.saved,
        reported.device,
        config.data,
        precision=config.precision,
        average=config.average,
        flip=config.eval.flip,
        trust_code=config.trust_code,
        scales=config.segment.test_scales,
    )
    examples = {
        kind: [_example(source, config, classes_of, int(scores.images[k]), float(scores.image_iou[k])) for k in places]
        for kind, places in pick(scores.image_iou).items()
    }
    headline = [*reported.headline, *reported.counts]
    return pixel_page(PixelFacts(**reported.run, headline=headline, notes=[], scores=scores, examples=examples))


def _example(source: MaskSource, config: ReportConfig, classes_of: Any, number: int, iou: float) -> Example:
    from PIL import Image

    from fasttricks.data.masks.pixels import read_pair
    from fasttricks.reporting.examples import Example, colors, paint_classes, small

    pair, palette = read_pair(source, number, config.data.max_pixels), colors(len(source.classes))
    image = Image.fromarray(pair.image)
    painted = [paint_classes(image, classes, palette) for classes in (pair.mask, classes_of(pair.image))]
    pictures = tuple(small(picture, 3) for picture in (image, *painted))
    return Example(source.name(number), f"IoU {iou:.1f} %", pictures)


def box_page(reported: Reported) -> str:
    """The page of a detection. Asks the network again for the images that it shows, 18 at most."""
    from fasttricks.commands.drawn_boxes import Finder
    from fasttricks.reporting.box_page import BoxFacts, box_page
    from fasttricks.reporting.examples import pick

    config, scores, source = reported.config, reported.found.answers, cast("BoxSource", reported.found.images)
    find = Finder(reported.saved, reported.device, config, config.detect)
    examples = {
        kind: [_boxed(source, config, find, int(scores.images[k]), float(scores.image_ap[k])) for k in places]
        for kind, places in pick(scores.image_ap).items()
    }
    headline = [*reported.headline, *reported.counts]
    facts = BoxFacts(
        **reported.run, headline=headline, notes=[], scores=scores, examples=examples, least_score=config.draw_score
    )
    return box_page(facts)


def _boxed(source: BoxSource, config: ReportConfig, find: Finder, number: int, ap: float) -> Example:
    from PIL import Image

    from fasttricks.commands.drawn_boxes import boxes_of
    from fasttricks.data.boxes.samples import read_boxed
    from fasttricks.reporting.boxes import Box, paint_boxes
    from fasttricks.reporting.examples import Example, colors, small
    from fasttricks.system.distributed import World
    from fasttricks.tasks.average_precision import AveragePrecision, Found

    pixels, objects = read_boxed(source, number, config.data.max_pixels)
    image = small(Image.fromarray(pixels), 2)
    across, down = image.width / pixels.shape[1], image.height / pixels.shape[0]
    columns = (objects.labels.tolist(), objects.xyxy.tolist(), objects.difficult.tolist())
    truth = [Box(source.classes[k], tuple(edges), None, hard) for k, edges, hard in zip(*columns, strict=True)]
    every = find(pixels)
    sure = Found(*(column[every.scores >= config.draw_score] for column in every))
    palette = dict(zip(source.classes, colors(len(source.classes)), strict=True))
    pictures = tuple(
        paint_boxes(image, [box.scaled(across, down) for box in boxes], palette)
        for boxes in (truth, boxes_of(sure, source.classes))
    )
    counts = AveragePrecision(len(source.classes))
    counts.update([sure], [objects], np.zeros(1, np.int64))
    alone = counts.result(World.alone(every.xyxy.device))
    right = int(alone.found.sum())
    wrong = int(alone.detections.sum()) - right
    told = f"AP {ap:.1f} %, {right:,} of {int(alone.objects.sum()):,} found, {wrong:,} wrong"
    return Example(source.name(number), told, pictures)
