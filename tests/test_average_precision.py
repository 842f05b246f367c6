"""Pascal VOC's average precision: against a loop in float64, torchmetrics (COCO's code), and cases worked out by hand."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fasttricks.data.boxes.source import Boxes
from fasttricks.data.sources.errors import DataError
from fasttricks.system.distributed import World
from fasttricks.tasks.average_precision import AveragePrecision, BoxScores, Found
from lib.tiny import ALONE

CPU = torch.device("cpu")
NAN = math.nan
Detection = tuple[float, int, Sequence[float]]
"""(score, class, xyxy)"""
Object = tuple[int, Sequence[float], bool]
"""(class, xyxy, difficult)"""
Image = tuple[list[Detection], list[Object]]


def found(detections: Sequence[Detection]) -> Found:
    return Found(
        torch.tensor([xyxy for _, _, xyxy in detections]).reshape(-1, 4),
        torch.tensor([score for score, _, _ in detections]),
        torch.tensor([label for _, label, _ in detections], dtype=torch.int64),
    )


def boxes(objects: Sequence[Object]) -> Boxes:
    return Boxes(
        np.array([xyxy for _, xyxy, _ in objects], np.float32).reshape(-1, 4),
        np.array([label for label, _, _ in objects], np.int64),
        np.array([difficult for *_, difficult in objects], np.bool_),
    )


def gathered(images: Sequence[Image], num_classes: int, numbers: Sequence[int] | None = None) -> AveragePrecision:
    """In batches of two."""
    scores, of = AveragePrecision(num_classes), list(range(len(images))) if numbers is None else list(numbers)
    for at in range(0, len(images), 2):
        part = images[at : at + 2]
        scores.update([found(d) for d, _ in part], [boxes(o) for _, o in part], np.array(of[at : at + 2], np.int64))
    return scores


def twin(images: Sequence[Image], label: int) -> tuple[float, float]:
    """(11-point AP, area) of a class: VOCevaldet.m and VOCap.m in loops, on their corner pixels, which are counted from 1."""
    truths = [
        [((x1 + 1, y1 + 1, x2, y2), hard) for k, (x1, y1, x2, y2), hard in objects if k == label]
        for _, objects in images
    ]
    every = [
        (score, image, (x1 + 1, y1 + 1, x2, y2))
        for image, (detections, _) in enumerate(images)
        for score, k, (x1, y1, x2, y2) in detections
        if k == label
    ]
    taken = [[False] * len(one) for one in truths]
    positives = sum(not hard for one in truths for _, hard in one)
    hits, misses, recall, precision = 0, 0, [], []
    for _, image, box in sorted(every, key=lambda one: -one[0]):
        largest, nearest = -math.inf, -1
        for at, (there, _) in enumerate(truths[image]):
            width = min(box[2], there[2]) - max(box[0], there[0]) + 1
            height = min(box[3], there[3]) - max(box[1], there[1]) + 1
            if width > 0 and height > 0:
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, there)]
                if (overlap := width * height / (sum(areas) - width * height)) > largest:
                    largest, nearest = overlap, at
        if largest >= 0.5 and truths[image][nearest][1]:
            continue
        if largest >= 0.5 and not taken[image][nearest]:
            taken[image][nearest] = True
            hits += 1
        else:
            misses += 1
        recall.append(hits / positives if positives else NAN)
        precision.append(hits / (hits + misses))
    if not positives:
        return NAN, NAN
    reached = [max((p for r, p in zip(recall, precision, strict=True) if r >= k / 10), default=0.0) for k in range(11)]
    steps, best = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for at in reversed(range(len(best) - 1)):
        best[at] = max(best[at], best[at + 1])
    area = sum((steps[at] - steps[at - 1]) * best[at] for at in range(1, len(steps)))
    return 100 * sum(reached) / 11, 100 * area


A, B, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (80, 80, 90, 90)
HALF = (0, 0, 10, 5)  # of A: their IoU is 0.5
BELOW = (0, 0, 10, 4)  # and 0.4
BY_HAND: dict[str, tuple[list[Image], list[float], list[float]]] = {
    "one box, found": ([([(0.9, 0, A)], [(0, A, False)])], [100], [100]),
    "one box, missed": ([([(0.9, 0, FAR)], [(0, A, False)])], [0], [0]),
    "no detections": ([([], [(0, A, False)])], [0], [0]),
    "IoU of exactly 0.5": ([([(0.9, 0, HALF)], [(0, A, False)])], [100], [100]),
    "IoU below 0.5": ([([(0.9, 0, BELOW)], [(0, A, False)])], [0], [0]),
    "found twice": ([([(0.9, 0, A), (0.8, 0, A)], [(0, A, False), (0, B, False)])], [600 / 11], [50]),
    "found twice, the object beside it too": (
        # the second is nearest to the first object, so it is wrong, though the other one is above 0.5 too
        [([(0.9, 0, A), (0.8, 0, (0, 0, 10, 9))], [(0, A, False), (0, (0, 0, 10, 6), False)])],
        [600 / 11],
        [50],
    ),
    "the surer is wrong": ([([(0.9, 0, FAR), (0.8, 0, A)], [(0, A, False)])], [50], [50]),
    "an image without an object": ([([(0.9, 0, A)], []), ([(0.8, 0, A)], [(0, A, False)])], [50], [50]),
    "a difficult object, found": ([([(0.9, 0, B), (0.8, 0, A)], [(0, A, False), (0, B, True)])], [100], [100]),
    "a difficult object, missed": ([([(0.8, 0, A)], [(0, A, False), (0, B, True)])], [100], [100]),
    "a difficult object, found twice": (
        [([(0.9, 0, B), (0.85, 0, B), (0.8, 0, A)], [(0, A, False), (0, B, True)])], [100], [100],
    ),
    "equal IoU: the earlier object": ([([(0.9, 0, A)], [(0, A, True), (0, A, False)])], [0], [0]),
    "all of a class difficult": ([([(0.9, 0, A), (0.9, 1, B)], [(0, A, False), (1, B, True)])], [100, NAN], [100, NAN]),
    "a class absent from the objects": ([([(0.9, 0, A), (0.9, 1, A)], [(0, A, False)])], [100, NAN], [100, NAN]),
    "a class absent from the detections": ([([(0.9, 0, A)], [(0, A, False), (1, B, False)])], [100, 0], [100, 0]),
    "another class at the place": ([([(0.9, 1, A)], [(0, A, False), (1, B, False)])], [0, 0], [0, 0]),
    "equal scores: the earlier image first": (
        [([(0.5, 0, FAR)], []), ([(0.5, 0, A)], [(0, A, False)])], [50], [50],
    ),
    "equal scores: the earlier place first": (
        [([(0.5, 0, A), (0.5, 0, FAR)], [(0, A, False)]), ([(0.5, 0, FAR)], [])], [100], [100],
    ),
    "a score that is NaN is the lowest": (
        [([(NAN, 0, FAR), (0.1, 0, A)], [(0, A, False)])], [100], [100],
    ),
    "a box with NaN": ([([(0.9, 0, (0, 0, NAN, 10)), (0.5, 0, A)], [(0, A, False)])], [50], [50]),
    "a recall of exactly 0.3": (
        [([(0.9 - k / 100, 0, (20 * k, 0, 20 * k + 10, 10)) for k in range(3)],
          [(0, (20 * k, 0, 20 * k + 10, 10), False) for k in range(10)])],
        [400 / 11], [30],
    ),
    "two of three, the third wrong": (
        [([(0.9, 0, A), (0.8, 0, FAR), (0.7, 0, B)], [(0, A, False), (0, B, False), (0, (40, 40, 50, 50), False)])],
        [(4 + 3 * 2 / 3) / 11 * 100], [(1 + 2 / 3) / 3 * 100],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_worked_out_by_hand(case: str) -> None:
    images, voc07, area = BY_HAND[case]
    scores = gathered(images, len(voc07)).result(ALONE)
    np.testing.assert_allclose(scores.ap_voc07, voc07, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.ap_area, area, rtol=0, atol=1e-12)
    assert (scores.map_voc07, scores.map_area) == (pytest.approx(np.nanmean(voc07)), pytest.approx(np.nanmean(area)))


def test_counts() -> None:
    """A difficult object is none that counts, and its detection is none; that of an absent class is one."""
    images = [
        ([(0.9, 0, A), (0.8, 0, A), (0.7, 0, B), (0.6, 1, A), (0.5, 2, A)], [(0, A, False), (0, B, True)]),
        ([], [(0, A, False), (1, A, False)]),
    ]
    scores = gathered(images, 3).result(ALONE)
    assert (scores.objects.tolist(), scores.found.tolist()) == ([2, 1, 0], [1, 0, 0])
    assert scores.detections.tolist() == [2, 1, 1]


def drawn(seed: int, count: int, *, difficult: float = 0.2) -> list[Image]:
    """Images with boxes on whole pixels in a small frame, so that scores and IoUs are equal, and exactly 0.5, often."""
    draws = np.random.default_rng(seed)

    def some(most: int) -> list[list[int]]:
        corners = draws.integers(0, 3, (int(draws.integers(0, most)), 2, 2))
        return [[*low.tolist(), *(low + size + 2).tolist()] for low, size in corners]

    return [
        (
            [(float(draws.integers(0, 8)) / 8, int(draws.integers(3)), box) for box in some(12)],
            [(int(draws.integers(3)), box, bool(draws.random() < difficult)) for box in some(8)],
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_against_a_loop(seed: int) -> None:
    images = drawn(seed, 40)
    scores = gathered(images, 3).result(ALONE)
    want = np.array([twin(images, label) for label in range(3)])
    np.testing.assert_allclose(np.stack([scores.ap_voc07, scores.ap_area], 1), want, rtol=1e-12)
    assert 1 < scores.map_voc07 < 60 and scores.found.sum() > 10  # neither nothing nor all


def test_the_score_of_an_image_is_that_of_the_image_alone() -> None:
    images = drawn(5, 30)
    numbers = np.random.default_rng(1).permutation(60)[:30].tolist()
    scores, alone = gathered(images, 3, numbers).result(ALONE), {}
    for number, image in zip(numbers, images, strict=True):
        counts = any(not difficult for *_, difficult in image[1])
        alone[number] = gathered([image], 3).result(ALONE).map_area if counts else NAN
    assert scores.images.tolist() == sorted(numbers) and len({*alone.values()}) > 6
    np.testing.assert_allclose(scores.image_ap, [alone[number] for number in sorted(numbers)], rtol=1e-12)
    assert np.isnan(scores.image_ap).any()


def apart(seed: int, count: int) -> list[Image]:
    """Images whose objects are so far apart that a detection is near one at most. There COCO matches as VOC does."""
    draws = np.random.default_rng(seed)
    images: list[Image] = []
    for _ in range(count):
        places = [(40 * x, 40 * y) for x in range(3) for y in range(3) if draws.random() < 0.5]
        objects = [(int(draws.integers(2)), (x, y, x + 20, y + 16), False) for x, y in places]
        detections = []
        for label, (x, y, right, bottom), _ in objects:
            for _ in range(int(draws.integers(0, 3))):
                dx, dy = draws.integers(-4, 5, 2).tolist()
                detections.append((float(draws.integers(0, 16)) / 16, label, (x + dx, y + dy, right + dx, bottom + dy)))
        detections += [(float(draws.random()), int(draws.integers(2)), (200, 200, 210, 220))] * int(
            draws.integers(0, 2)
        )
        images.append((detections, objects))
    return images


@pytest.mark.parametrize("form", ["voc07", "area"])
def test_against_torchmetrics(form: str) -> None:
    """COCO's code at recalls of 0, 0.1, ..., 1, and at each recall that there is, whose mean is the area."""
    from torchmetrics.detection import MeanAveragePrecision

    images = apart(3, 30)
    scores = gathered(images, 2).result(ALONE)
    for label in range(2):
        count = int(scores.objects[label])
        recalls = [k / 10 for k in range(11)] if form == "voc07" else [k / count for k in range(1, count + 1)]
        metric = MeanAveragePrecision(
            iou_thresholds=[0.5], rec_thresholds=recalls, max_detection_thresholds=[1, 10, 100], extended_summary=True
        )
        for detections, objects in images:
            one, true = found([d for d in detections if d[1] == label]), boxes([o for o in objects if o[0] == label])
            metric.update(
                [{"boxes": one.xyxy, "scores": one.scores, "labels": one.labels}],
                [{"boxes": torch.from_numpy(true.xyxy), "labels": torch.from_numpy(true.labels)}],
            )
        precision = metric.compute()["precision"][0, :, 0, 0, -1]
        ap = (scores.ap_voc07 if form == "voc07" else scores.ap_area)[label]
        assert precision.shape == (len(recalls),) and 0.1 < float(precision.mean()) < 0.95
        assert ap == pytest.approx(100 * float(precision.double().mean()), rel=1e-12)


@dataclass(frozen=True)
class Several(World):
    """The main one of some ranks in one process: collect() adds the parts of `others`."""

    others: tuple[AveragePrecision, ...] = ()

    def collect(self, value: bytes) -> list[bytes]:
        return [value, *(pickle.dumps(other._columns()) for other in self.others)]

    def gather(self, value: bytes) -> list[bytes]:
        return [value] * self.size


def same(got: BoxScores, want: BoxScores) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ranks_batches_and_order_change_no_bit() -> None:
    """Eleven images on one rank, and in another order on three, whose second has none."""
    images = drawn(7, 11)
    want = gathered(images, 3).result(ALONE)
    order = np.random.default_rng(0).permutation(11).tolist()
    ranks = [gathered([images[at] for at in part], 3, part) for part in (order[:4], [], order[4:])]
    same(ranks[0].result(Several(0, 3, 0, 3, CPU, others=tuple(ranks[1:]))), want)
    same(gathered([images[at] for at in order], 3, order).result(ALONE), want)


def test_half_precision_scores() -> None:
    images = drawn(5, 9)
    scores = AveragePrecision(3)
    for number, (detections, objects) in enumerate(images):
        one = found(detections)
        scores.update([one._replace(scores=one.scores.bfloat16())], [boxes(objects)], np.array([number]))
    same(scores.result(ALONE), gathered(images, 3).result(ALONE))  # eighths are exact


REFUSED: dict[str, tuple[list[Image], list[int], type[Exception], str]] = {
    "nothing that counts": (
        [([(0.9, 0, A)], [(0, A, True)]), ([], [])],
        [0, 1],
        DataError,
        r"no object on the 2 images counts \(1 are difficult\): at least one must",
    ),
    "no image": ([], [], DataError, "no object on the 0 images counts"),
    "an image twice": ([([], [(0, A, False)])] * 2, [4, 4], ValueError, "image 4 came 2 times"),
    "a detection of no class": (
        [([(0.9, 2, A), (0.9, -1, A)], [(0, A, False)])], [0], ValueError, "2 detections have a class outside 0 to 1",
    ),
    "an object of no class": ([([], [(2, A, False)])], [0], ValueError, "1 objects have a class outside 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_no_result(case: str) -> None:
    """Raised on every rank, as all read the outcome of the first."""
    images, numbers, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        gathered(images, 2, numbers).result(ALONE)

    class Other(Several):
        def collect(self, value: bytes) -> list[bytes]:
            return []

        def gather(self, value: bytes) -> list[bytes]:
            assert value == b""
            return [outcome, b""]

    outcomes: list[bytes] = []

    class First(Several):
        def gather(self, value: bytes) -> list[bytes]:
            outcomes.append(value)
            return [value, b""]

    with pytest.raises(error, match=words):
        gathered(images, 2, numbers).result(First(0, 2, 0, 2, CPU))
    (outcome,) = outcomes
    with pytest.raises(error, match=words):
        AveragePrecision(2).result(Other(1, 2, 1, 2, CPU))


def test_other_lengths() -> None:
    columns: Any = ([found([])], [boxes([])] * 2, np.array([0]))
    with pytest.raises(ValueError, match="longer"):
        AveragePrecision(2).update(*columns)
