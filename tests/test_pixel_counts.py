"""mIoU and pixel accuracy: against torchmetrics, a loop in float64, and cases worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fasttricks.data.masks.source import IGNORED
from fasttricks.data.sources.errors import DataError
from fasttricks.system.distributed import World
from fasttricks.tasks.pixel_counts import PixelCounts, PixelScores
from lib.tiny import ALONE

CPU = torch.device("cpu")
X = IGNORED


def scores(predicted: Sequence[int], masks: Sequence[int], num_classes: int) -> PixelScores:
    """Those of one image of one row."""
    counts = PixelCounts(num_classes, CPU)
    counts.update(torch.tensor([[predicted]]), torch.tensor([[masks]]))
    return counts.result(ALONE)


def twin(predicted: np.ndarray, masks: np.ndarray, num_classes: int) -> tuple[float, float, list[float]]:
    """The definition: a loop over the classes in float64."""
    kept = masks != IGNORED
    p, t = predicted[kept], masks[kept]
    iou = []
    for k in range(num_classes):
        union = float(((p == k) | (t == k)).sum())
        iou.append(100 * float(((p == k) & (t == k)).sum()) / union if union else math.nan)
    return float(np.nanmean(iou)), 100 * float((p == t).mean()), iou


NAN = math.nan
BY_HAND = {
    "all right": ([0, 1, 2], [0, 1, 2], 3, 100.0, 100.0, [100, 100, 100]),
    "all wrong": ([1, 2, 0], [0, 1, 2], 3, 0.0, 0.0, [0, 0, 0]),
    "one pixel, right": ([1], [1], 2, 100.0, 100.0, [NAN, 100]),
    "one pixel, wrong": ([0], [1], 2, 0.0, 0.0, [0, 0]),
    "a class absent from both": ([0, 1], [0, 1], 3, 100.0, 100.0, [100, 100, NAN]),
    "a class that is predicted alone": ([0, 2], [0, 1], 3, 100 / 3, 50.0, [100, 0, 0]),
    "a class that is true alone": ([0, 0], [0, 1], 2, 25.0, 50.0, [50, 0]),
    "ignored pixels, whatever is predicted": ([0, 1, 1, 0], [0, 1, X, X], 2, 100.0, 100.0, [100, 100]),
    "quarters": ([0, 0, 0, 0, 1], [0, 1, 1, 1, 1], 2, 25.0, 40.0, [25, 25]),
    "the last class": ([254, 0], [254, X], 255, 100.0, 100.0, [*[NAN] * 254, 100]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_worked_out_by_hand(case: str) -> None:
    predicted, masks, num_classes, miou, accuracy, iou = BY_HAND[case]
    found = scores(predicted, masks, num_classes)
    assert found.miou == pytest.approx(miou, abs=1e-12)
    assert found.pixel_accuracy == pytest.approx(accuracy, abs=1e-12)
    np.testing.assert_allclose(found.iou, iou, rtol=0, atol=1e-12)
    assert found.confusion.sum() == sum(value != X for value in masks)
    pairs = [(t, p) for t, p in zip(masks, predicted, strict=True) if t != X]
    assert all(found.confusion[pair] == pairs.count(pair) for pair in pairs)


@pytest.mark.parametrize("num_classes", [2, 11, 150])
def test_against_torchmetrics_and_a_loop(num_classes: int) -> None:
    """Random images of other sizes; a class in ten is nowhere."""
    from torchmetrics.functional import jaccard_index

    generator = torch.Generator().manual_seed(num_classes)
    counts, predicted, masks = PixelCounts(num_classes, CPU), [], []
    for height, width in ((5, 7), (1, 1), (16, 9)):
        p, t = torch.randint(max(2, num_classes * 9 // 10), (2, 3, height, width), generator=generator)
        t[torch.rand(t.shape, generator=generator) < 0.2] = IGNORED
        counts.update(p, t)
        predicted.append(p.flatten())
        masks.append(t.flatten())
    found, p, t = counts.result(ALONE), torch.cat(predicted), torch.cat(masks)
    miou, accuracy, iou = twin(p.numpy(), t.numpy(), num_classes)
    assert found.miou == pytest.approx(miou, rel=1e-12)
    assert found.pixel_accuracy == pytest.approx(accuracy, rel=1e-12)
    np.testing.assert_allclose(found.iou, iou, rtol=1e-12)
    each = jaccard_index(p, t, "multiclass", num_classes=num_classes, ignore_index=IGNORED, average="none")
    there = ~np.isnan(found.iou)  # of a class that is nowhere torchmetrics says 0
    np.testing.assert_allclose(found.iou[there] / 100, each.numpy()[there], rtol=1e-6)
    mean = jaccard_index(p, t, "multiclass", num_classes=num_classes, ignore_index=IGNORED)
    assert found.miou / 100 == pytest.approx(float(mean), rel=1e-6)


def test_an_empty_mask_changes_nothing_and_nothing_but_empty_masks_is_refused() -> None:
    counts = PixelCounts(3, CPU)
    empty = torch.full((1, 4, 4), IGNORED)
    counts.update(torch.zeros_like(empty), empty)
    with pytest.raises(DataError, match="all of their 16 pixels are ignored"):
        counts.result(ALONE)
    counts.update(torch.tensor([[[1, 2]]]), torch.tensor([[[1, 1]]]))
    before = counts.result(ALONE)
    counts.update(torch.ones_like(empty), empty)
    counts.update(torch.zeros((0, 4, 4), dtype=torch.int64), torch.zeros((0, 4, 4), dtype=torch.int64))
    after = counts.result(ALONE)
    assert (before.miou, before.pixel_accuracy) == (after.miou, after.pixel_accuracy) == (25.0, 50.0)


@pytest.mark.parametrize("predicted, mask", [(3, 0), (-1, 0), (0, 3), (0, 254), (0, -1), (3, 3)])
def test_a_class_that_is_none_is_no_result(predicted: int, mask: int) -> None:
    with pytest.raises(ValueError, match=r"1 pixels have a class, or a prediction, outside 0 to 2"):
        scores([0, predicted], [0, mask], 3)


def test_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"predicted is \(1, 2, 2\), masks \(1, 2, 3\)"):
        PixelCounts(2, CPU).update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 3, dtype=torch.int64))


@dataclass(frozen=True)
class Several(World):
    """Ranks in one process: sum_() adds the counts of `others`."""

    others: tuple[torch.Tensor, ...] = ()

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        return values.add_(sum(self.others))


def test_ranks_change_no_bit() -> None:
    """Nine images on one rank, and on three, whose second has none."""
    generator = torch.Generator().manual_seed(0)
    predicted, masks = torch.randint(5, (2, 9, 6, 6), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = IGNORED
    alone, ranks = PixelCounts(5, CPU), [PixelCounts(5, CPU) for _ in range(3)]
    alone.update(predicted, masks)
    for rank, part in ((2, slice(0, 2)), (0, slice(2, 9))):
        ranks[rank].update(predicted[part], masks[part])
    want = alone.result(ALONE)
    for rank in range(3):
        others = tuple(ranks[other]._counts for other in range(3) if other != rank)
        for _ in range(2):  # a result leaves the counts as they were
            found = ranks[rank].result(Several(rank, 3, rank, 3, CPU, others=others))
            np.testing.assert_array_equal(found.confusion, want.confusion)
            assert (found.miou, found.pixel_accuracy) == (want.miou, want.pixel_accuracy)
