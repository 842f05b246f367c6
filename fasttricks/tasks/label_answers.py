"""The scores of a network that says of each class whether it is in the image: average precision, and counts at a threshold."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasttricks.system.distributed import World

_AT_ONCE = 1024
"""Images whose logits are in float64 at a time."""
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class LabelAnswered(NamedTuple):
    """Answers over all images of all ranks, on the host, for K classes. A class is predicted where its logit is above 0."""

    images: int
    average_precision: Floats
    """(K,): 0 to 1; NaN for a class without a positive image."""
    positives: Counts
    """(K,): images that have the class."""
    predicted: Counts
    """(K,): images for which it is predicted."""
    right: Counts
    """(K,): positives for which it is predicted."""
    undecided: int
    """Logits that are NaN. Each counts as wrong: it ranks behind all others of a positive image, before them of another."""
    loss: float
    """Mean over images and classes of the binary cross-entropy, in nats; NaN where a logit is."""

    @property
    def mean_average_precision(self) -> float:
        """Mean over the classes that have a positive image, 0 to 1; NaN where none has."""
        known = self.average_precision[self.positives > 0]
        return float(known.mean()) if known.size else float("nan")

    @property
    def precision(self) -> Floats:
        """(K,): right / predicted, 0 to 1; NaN for a class that is never predicted."""
        return _share(self.right, self.predicted)

    @property
    def recall(self) -> Floats:
        """(K,): right / positives, 0 to 1; NaN for a class without a positive image."""
        return _share(self.right, self.positives)

    @property
    def f1(self) -> Floats:
        """(K,): 2 right / (predicted + positives), 0 to 1; NaN for a class that is neither there nor predicted."""
        return _share(2 * self.right, self.predicted + self.positives)

    @property
    def micro_f1(self) -> float:
        """F1 of all classes together, 0 to 1; 0 where no class is there or predicted."""
        total = int(self.predicted.sum() + self.positives.sum())
        return 2 * int(self.right.sum()) / total if total else 0.0


class LabelScores:
    """Gathers the logits of one rank, batch by batch; joined over the ranks at the end, in the order of the images.

    So neither ranks nor batches change the result. update() does not sync. Memory: 5 N K bytes on the device (20 MB for 50,000
    images of 80 classes), and in result() up to four times that on the host of the main rank.
    Oracles: torchmetrics and a float64 twin in numpy (tests/test_multilabel.py).
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, images: NDArray[np.int64]) -> None:
        """Add the images of a batch. logits: (N, K), any float type; targets: (N, K), 1 for the classes of an image, else 0;
        images: (N,), numbers in the source."""
        numbers = torch.from_numpy(np.ascontiguousarray(images))
        self._kept.append((logits.float(), targets > 0, numbers))

    def result(self, world: World) -> LabelAnswered:
        """The answers of all ranks, on every rank. A collective, and a sync. Call it once. Raises ValueError without an image."""
        own = [torch.cat(columns).cpu().numpy() for columns in zip(*self._kept, strict=True)]
        self._kept.clear()
        parts = [own] if world.size == 1 else [pickle.loads(part) for part in world.collect(pickle.dumps(own))]
        found = b""
        if world.is_main:
            found = pickle.dumps(_joined([part for part in parts if part]))
        result: LabelAnswered | None = pickle.loads(world.gather(found)[0])
        if result is None:
            raise ValueError("no image on any rank; find_dataset refuses an empty val/ before this")
        return result


def _joined(parts: list[list[NDArray[Any]]]) -> LabelAnswered | None:
    """The answers of the images of all parts, each (logits, targets, numbers of the images); None without a part."""
    if not parts:
        return None
    logits, targets, images = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = images.argsort(kind="stable")
    return score_labels(logits[order], targets[order])


def score_labels(logits: NDArray[np.float32], targets: NDArray[np.bool_]) -> LabelAnswered:
    """The answers of N images. logits: (N, K), N above 0; targets: (N, K), whether the class is in the image."""
    nan = np.isnan(logits)
    scores = np.where(nan, np.where(targets, -np.inf, np.inf), logits)
    predicted = scores > 0
    classes = range(logits.shape[1])
    return LabelAnswered(
        images=len(logits),
        average_precision=np.array([average_precision(scores[:, k], targets[:, k]) for k in classes], np.float64),
        positives=targets.sum(0),
        predicted=predicted.sum(0),
        right=(predicted & targets).sum(0),
        undecided=int(nan.sum()),
        loss=float(_binary_cross_entropy(logits, targets)),
    )


def average_precision(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Average precision of the images of one class, 0 to 1: the sum over thresholds of (recall's increase) x precision.

    scores: (N,), higher is likelier, without NaN; positive: (N,). Images of equal scores pass a threshold together, so their
    order does not matter, as in torchmetrics (thresholds=None) and scikit-learn. NaN where no image is positive.
    """
    count = int(positive.sum())
    if not count:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of the images of each score
    right = positive[order].cumsum()[last]
    gained = np.diff(right, prepend=0)
    return float((gained * (right / (last + 1))).sum() / count)


def _binary_cross_entropy(logits: NDArray[np.float32], targets: NDArray[np.bool_]) -> np.float64:
    """Mean over images and classes, in nats, in float64: log(1 + exp(-z)) for a positive, log(1 + exp(z)) for another."""
    total = np.float64(0)
    for at in range(0, len(logits), _AT_ONCE):  # float64 copies of all would take more than the logits
        z, there = logits[at : at + _AT_ONCE].astype(np.float64), targets[at : at + _AT_ONCE]
        with np.errstate(invalid="ignore"):  # a NaN stays one
            total += np.logaddexp(0, np.where(there, -z, z)).sum()
    return total / logits.size


def _share(part: Counts, whole: Counts) -> Floats:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)
