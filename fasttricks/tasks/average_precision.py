"""Pascal VOC's average precision of detections, as its development kit (VOCevaldet.m, VOCap.m) defines it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttricks.data.boxes.source import Boxes
from fasttricks.data.sources.errors import DataError
from fasttricks.system.distributed import World

LEAST_IOU = 0.5
"""Intersection over union of a detection and the object that it finds, at least."""
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Found(NamedTuple):
    """The detections on one image, on any device; M may be 0. Where two have one score, the first counts as the surer."""

    xyxy: Tensor
    """(M, 4): left, top, right, bottom edge, in the pixels of the Boxes they are compared with."""
    scores: Tensor
    """(M,), any float type."""
    labels: Tensor
    """(M,) int64: 0 to number of classes - 1, without a number for the background."""


class BoxScores(NamedTuple):
    """The scores of a split, for K classes. A class without an object that counts has no average precision and is in no mean."""

    map_voc07: float
    """%: the mean of `ap_voc07`."""
    map_area: float
    """%: the mean of `ap_area`."""
    ap_voc07: Floats
    """(K,), %: the mean over the recalls 0, 0.1, ..., 1 of the best precision at that recall or a higher one. NaN: no object."""
    ap_area: Floats
    """(K,), %: the area below the best precision at each recall or a higher one (VOC 2010 and later). NaN: no object."""
    objects: Counts
    """(K,): objects that count: all but the difficult ones."""
    found: Counts
    """(K,): objects that count and that a detection found."""
    detections: Counts
    """(K,): detections, without those of a difficult object."""
    images: Counts
    """(N,): the numbers of the images, rising."""
    image_ap: Floats
    """(N,), %: the AP by area of an image alone, its mean over the image's classes. NaN: no object on it counts."""


class AveragePrecision:
    """Gathers the detections and the objects of one rank; joined over the ranks at the end, in the order of the images.

    In the order of their scores each detection is matched to the object of its class with which it has the largest IoU, the
    first of equal ones. Below LEAST_IOU it is wrong; on a difficult object it counts as nothing; on one that was found
    before it is wrong, though another object is near. Detections of one score come in the order of the images, and in one
    image in their own. So neither batches nor ranks change a bit. A score that is NaN is the lowest; a box with NaN finds
    nothing.

    update() does not sync. Memory: 32 bytes a detection on its device, and in result() four times that on the host of the main
    rank. Oracles: torchmetrics' MeanAveragePrecision where COCO defines the same, a loop in float64
    (tests/test_average_precision.py).
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._images: list[int] = []
        self._found: list[Found] = []
        self._truths: list[Boxes] = []

    @torch.no_grad()
    def update(self, found: Sequence[Found], truths: Sequence[Boxes], images: NDArray[np.int64]) -> None:
        """Add N images: the detections and objects of each, and (N,) its number in the source. Each image comes once."""
        for number, detections, objects in zip(images.tolist(), found, truths, strict=True):
            self._images.append(number)
            self._found.append(detections)
            self._truths.append(objects)

    def result(self, world: World) -> BoxScores:
        """The scores over the images of all ranks, the same on all. A collective, and a sync. Call it once.

        Raises DataError where no object counts; ValueError where update() got an image twice, or a class that is none of the K.
        """
        own = pickle.dumps(self._columns())
        for kept in (self._images, self._found, self._truths):
            kept.clear()
        parts, outcome = world.collect(own), b""
        if world.is_main:
            outcome = pickle.dumps(_attempt([pickle.loads(part) for part in parts], self._num_classes))
        result: BoxScores | ValueError = pickle.loads(world.gather(outcome)[0])
        if isinstance(result, ValueError):
            raise result
        return result

    def _columns(self) -> tuple[list[int], tuple[NDArray[Any], ...], tuple[NDArray[Any], ...]]:
        """(images, detections, objects) of this rank, the latter as columns."""
        images = np.array(self._images, np.int64)
        detections = (
            np.repeat(images, [len(one.scores) for one in self._found]),
            _joined([one.labels for one in self._found], torch.int64),
            _joined([one.scores for one in self._found], torch.float32),
            _joined([one.xyxy for one in self._found], torch.float32).reshape(-1, 4),
        )
        none = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
        truths = [none, *self._truths]
        objects = (
            np.repeat(images, [len(one) for one in self._truths]),
            np.concatenate([one.labels for one in truths]),
            np.concatenate([one.difficult for one in truths]),
            np.concatenate([one.xyxy for one in truths]),
        )
        return self._images[:], detections, objects


def _joined(parts: list[Tensor], dtype: torch.dtype) -> NDArray[Any]:
    """All parts, one after the other, on the host: one copy and one sync."""
    flat = [part.to(dtype).flatten() for part in parts] or [torch.zeros(0, dtype=dtype)]
    joined: NDArray[Any] = torch.cat(flat).cpu().numpy()
    return joined


def _attempt(parts: list[Any], num_classes: int) -> BoxScores | ValueError:
    """The scores, or the error for all ranks to raise: one that raised it alone would leave the others waiting."""
    try:
        return _score(parts, num_classes)
    except ValueError as error:
        return error


def _score(parts: list[Any], num_classes: int) -> BoxScores:
    images = np.array([image for part in parts for image in part[0]], np.int64)
    numbers, times = np.unique(images, return_counts=True)
    if (times > 1).any():
        raise ValueError(f"image {numbers[times > 1][0]} came {times.max()} times: must come once")
    found, truths = (_in_order([part[at] for part in parts]) for at in (1, 2))
    for name, (_, labels, *_) in (("detections", found), ("objects", truths)):
        if strange := int(((labels < 0) | (labels >= num_classes)).sum()):
            raise ValueError(f"{strange} {name} have a class outside 0 to {num_classes - 1}")
    classes = [_score_class(found, truths, label) for label in range(num_classes)]
    objects, hits, detections, voc07, area = (
        np.array(column) for column in zip(*(c[:5] for c in classes), strict=True)
    )
    if not objects.any():
        rule = "at least one must; check the annotations"
        hard = f"{len(truths[1])} are difficult"
        raise DataError(f"validation boxes: no object on the {len(images)} images counts ({hard}): {rule}")
    means, alone = (float(np.nanmean(voc07)), float(np.nanmean(area))), _by_image([c[5] for c in classes], numbers)
    return BoxScores(*means, voc07, area, objects, hits, detections, numbers, alone)


def _by_image(classes: list[dict[int, float]], numbers: Counts) -> Floats:
    """(N,): the mean over the classes of the AP that `classes` has for each of N images, in %; NaN where none has one."""
    sums, counts = np.zeros(len(numbers)), np.zeros(len(numbers))
    for one in classes:
        at = numbers.searchsorted(np.array([*one], np.int64))
        sums[at] += [*one.values()]
        counts[at] += 1
    mean: Floats = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return mean


def _in_order(parts: list[tuple[NDArray[Any], ...]]) -> list[NDArray[Any]]:
    """The columns of all ranks by image, and in an image as they came."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = columns[0].argsort(kind="stable")
    return [column[order] for column in columns]


def _score_class(
    found: list[NDArray[Any]], truths: list[NDArray[Any]], label: int
) -> tuple[int, int, int, float, float, dict[int, float]]:
    """(objects, found objects, detections that count, 11-point AP, AP by area, that of each image) of a class, AP in % or NaN."""
    image, _, score, box = (column[found[1] == label] for column in found)
    at, _, difficult, there = (column[truths[1] == label] for column in truths)
    order = np.argsort(np.where(np.isnan(score), np.inf, -score), kind="stable")
    best = _best(image[order], box[order].astype(np.float64), at, there.astype(np.float64))
    near = best >= 0
    counts = ~(near & difficult[best]) if len(at) else np.ones(len(best), np.bool_)
    right = np.zeros(len(best), np.bool_)
    right[np.flatnonzero(near)[np.unique(best[near], return_index=True)[1]]] = True  # the surest of each object
    right, shown, objects = right[counts], image[order][counts], int((~difficult).sum())
    if not objects:
        return objects, 0, len(right), float("nan"), float("nan"), {}
    voc07, area = _average(right, objects)
    rows = shown.argsort(kind="stable")  # by image, and in an image by score
    there, each = np.unique(at[~difficult], return_counts=True)
    first, end = shown[rows].searchsorted(there), shown[rows].searchsorted(there, "right")
    parts = zip(there.tolist(), first, end, each.tolist(), strict=True)
    alone = {number: 100 * _average(right[rows[a:b]], count)[1] for number, a, b, count in parts}
    return objects, int(right.sum()), len(right), 100 * voc07, 100 * area, alone


def _best(image: Counts, boxes: Floats, at: Counts, there: Floats) -> Counts:
    """(M,): the object with which each of M detections has the largest IoU, the first of equal ones; -1: below LEAST_IOU.

    image: (M,), of the detections; boxes: (M, 4); at: (T,), the images of the objects, ascending; there: (T, 4).
    """
    first, end = at.searchsorted(image), at.searchsorted(image, "right")
    rows = np.repeat(np.arange(len(image)), end - first)  # each detection with each object of its image
    objects = np.arange(len(rows)) - np.repeat(np.cumsum(end - first) - end, end - first)
    a, b = boxes[rows], there[objects]
    width, height = (np.minimum(a[:, k + 2], b[:, k + 2]) - np.maximum(a[:, k], b[:, k]) for k in (0, 1))
    shared = np.where((width > 0) & (height > 0), width * height, 0.0)
    iou = np.where(shared > 0, shared / (_area(a) + _area(b) - shared), 0.0)
    order = np.lexsort((objects, -iou, rows))
    starts = np.flatnonzero(
        np.diff(rows, prepend=-1)
    )  # of each detection whose image has an object; lexsort keeps the rows
    top, best = order[starts], np.full(len(image), -1)
    best[rows[top]] = np.where(iou[top] >= LEAST_IOU, objects[top], -1)
    return best


def _area(boxes: Floats) -> Floats:
    area: Floats = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area


def _average(right: NDArray[np.bool_], objects: int) -> tuple[float, float]:
    """(11-point AP, AP by area), 0 to 1, of detections in the order of their scores.

    Recalls are compared as whole numbers, so that 3 of 10 objects reach a recall of 0.3.
    """
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at that recall or a higher one

    def at_least(recall_tenths: int) -> float:
        reached = int(np.searchsorted(10 * hits, recall_tenths * objects))
        return float(best[reached]) if reached < len(best) else 0.0

    return sum(map(at_least, range(11))) / 11, float(best[right].sum()) / objects
