"""A classifier's answers over a data set: confusion matrix, calibration, the most confident mistakes. tasks/ fills them."""

from __future__ import annotations

import pickle
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fasttricks.system.distributed import World
from fasttricks.system.transfer import to_device

BINS = 15
"""Their width is equal, over confidences above 0 to 1."""
MISTAKES = 50
_ONE = 1 << 40
"""A confidence of 1 in the sums, which are whole numbers: exact, so that no order, batch or rank changes them."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Mistakes(NamedTuple):
    """The most confident mistakes, the most confident first, of equal ones that of the lower image: M <= MISTAKES of them."""

    images: Counts
    """(M,): their numbers in the source."""
    true: Counts
    """(M,): their labels."""
    predicted: Counts
    """(M,): the classes that they were taken for."""
    confidence: Floats
    """(M,): softmax of those classes, above 0 to 1."""


class Answered(NamedTuple):
    """Answers over all images of all ranks, on the host, for K classes. An image with a NaN logit has no prediction."""

    confusion: Counts
    """(K, K), [true, predicted]: images. Those without a prediction are in `undecided` alone."""
    undecided: Counts
    """(K,), by true class: images without a prediction. They are wrong, and in no bin."""
    bin_count: Counts
    """(BINS,): images whose confidence is above b / BINS and at most (b + 1) / BINS, in bin b (Guo et al., 2017)."""
    bin_right: Counts
    """(BINS,): those of them that are classified right."""
    bin_confidence: Floats
    """(BINS,): the sum of their confidences."""
    nll: float
    """Mean negative log-likelihood of the labels, in nats; NaN where an image has no prediction."""
    mistakes: Mistakes

    @property
    def seen(self) -> Counts:
        """(K,): images of each class."""
        seen: Counts = self.confusion.sum(1) + self.undecided
        return seen

    @property
    def right(self) -> Counts:
        """(K,): those of them that are classified right."""
        return self.confusion.diagonal().copy()

    @property
    def accuracy(self) -> Floats:
        """(K,): right / seen, 0 to 1; NaN for a class without images."""
        seen = self.seen
        return np.where(seen > 0, self.right / np.maximum(seen, 1), np.nan)

    @property
    def confusions(self) -> list[tuple[int, int, int]]:
        """(true, predicted, images) of each pair of classes that is confused, the most frequent first."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        true, predicted = wrong.nonzero()
        order = (-wrong[true, predicted]).argsort(kind="stable")
        return [(int(true[i]), int(predicted[i]), int(wrong[true[i], predicted[i]])) for i in order]

    @property
    def ece(self) -> float:
        """Expected calibration error, 0 to 1: sum over bins of |right - confidence| / images. NaN without any prediction."""
        seen = int(self.bin_count.sum())
        return float(np.abs(self.bin_right - self.bin_confidence).sum() / seen) if seen else float("nan")


class Outputs(NamedTuple):
    """The logits of all images, in the order of the images, on the host: to fit a temperature on."""

    logits: Tensor
    """(N, K) float32."""
    labels: Tensor
    """(N,) int64."""
    images: Tensor
    """(N,) int64: their numbers in the source."""


class Answers:
    """Gathers the answers of one rank, batch by batch; merged over the ranks at the end.

    Among equal logits the lower class is predicted, as in count_correct(). A confidence is the largest value of softmax in
    float64; with an infinite logit, its limit: 1 / the number of classes that share the largest.

    keep_logits: keep them too, for outputs(): 4 N K bytes of the host (200 MB for 50,000 images of 1,000 classes), and a copy to
    the host a batch. Else update() does not sync, and memory does not grow with the images: 8 K (K + 1) bytes on the device,
    8 MB for 1,000 classes.

    Oracles: torchmetrics and a float64 twin in numpy (tests/test_answers.py).
    """

    def __init__(self, num_classes: int, device: torch.device, *, keep_logits: bool = False) -> None:
        self._classes, self._device = num_classes, device
        self._kept: list[Outputs] | None = [] if keep_logits else None
        # row by true class; the last column is of no prediction
        self._confusion = torch.zeros(num_classes * (num_classes + 1), dtype=torch.int64, device=device)
        self._bins = torch.zeros(3, BINS, dtype=torch.int64, device=device)  # images, right, confidence x _ONE
        self._edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=device)[1:-1].contiguous()
        self._nll = torch.zeros((), dtype=torch.float64, device=device)
        self._worst = _no_mistakes(device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, images: NDArray[np.int64]) -> None:
        """Add the images of a batch. logits: (N, K), any float type; labels: (N,) int64; images: (N,), numbers in the source."""
        numbers = to_device(torch.from_numpy(np.ascontiguousarray(images)), self._device)
        exact = logits.double()
        decided = ~exact.isnan().any(1)
        predicted = exact.argmax(1)  # the first of equal ones
        column = torch.where(decided, predicted, self._classes)
        one = torch.ones_like(labels)
        self._confusion.index_add_(0, labels * (self._classes + 1) + column, one)
        confidence, right = _confidence(exact), decided & (predicted == labels)
        bins = torch.bucketize(confidence, self._edges)
        parts = (decided.long(), right.long(), (confidence * _ONE).round().nan_to_num(0).long())
        for sums, part in zip(self._bins, parts, strict=True):
            sums.index_add_(0, bins, part * decided)
        self._nll += functional.cross_entropy(exact, labels, reduction="sum")
        wrong = torch.where(decided & ~right, confidence, -1.0)
        self._worst = _most_confident([self._worst, (wrong, numbers, labels, predicted)])
        if self._kept is not None:
            self._kept.append(Outputs(logits.float().cpu(), labels.cpu(), numbers.cpu()))

    def result(self, world: World) -> Answered:
        """The answers of all ranks, on every rank. A collective, and a sync. Call it once. Raises ValueError without an image."""
        for sums in (self._confusion, self._bins, self._nll):
            world.sum_(sums)
        worst = [part.cpu() for part in self._worst]
        gathered = [pickle.loads(part) for part in world.gather(pickle.dumps([part.numpy() for part in worst]))]
        merged = _most_confident([tuple(map(torch.from_numpy, part)) for part in gathered])
        confidence, images, true, predicted = (part.numpy()[merged[0].numpy() >= 0] for part in merged)
        confusion = self._confusion.view(self._classes, -1).cpu().numpy()
        count, right, sums = self._bins.cpu().numpy()
        if not (seen := int(confusion.sum())):
            raise ValueError("no image on any rank; find_dataset refuses an empty val/ before this")
        return Answered(
            confusion=confusion[:, :-1].copy(),
            undecided=confusion[:, -1].copy(),
            bin_count=count,
            bin_right=right,
            bin_confidence=sums / _ONE,
            nll=self._nll.item() / seen,
            mistakes=Mistakes(images, true, predicted, confidence),
        )

    def outputs(self, world: World) -> Outputs | None:
        """The logits of all images, whatever the ranks and batches, on the main rank; None on the others. A collective.

        Needs keep_logits. Memory on the main rank: up to four times 4 N K bytes, the copies of it too.
        """
        if self._kept is None:
            raise ValueError("outputs() needs keep_logits=True")
        empty = Outputs(torch.zeros(0, self._classes), *(torch.zeros(0, dtype=torch.int64) for _ in range(2)))
        own = Outputs(*map(torch.cat, zip(empty, *self._kept, strict=True)))
        self._kept.clear()
        if world.size == 1:
            return _by_image([own])
        gathered = [pickle.loads(part) for part in world.collect(pickle.dumps([part.numpy() for part in own]))]
        return _by_image([Outputs(*map(torch.from_numpy, part)) for part in gathered]) if world.is_main else None


def _confidence(logits: Tensor) -> Tensor:
    """The largest value of softmax of each row, (N,) float64; NaN for a row with a NaN; with an infinite one, its limit."""
    largest = logits.max(1, keepdim=True).values
    shared = (logits == largest).sum(1)
    finite = logits.softmax(1).max(1).values
    return torch.where(largest.squeeze(1).isinf(), shared.double().reciprocal(), finite)


_Rows = tuple[Tensor, ...]
"""(confidence, image, true, predicted), each (N,); a confidence of -1 marks no mistake."""


def _no_mistakes(device: torch.device) -> _Rows:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return none.double(), none, none, none


def _most_confident(parts: list[_Rows]) -> _Rows:
    """The first MISTAKES of all rows by confidence, of equal ones by image. No sync."""
    rows = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    by_image = rows[1].argsort(stable=True)
    order = by_image[rows[0][by_image].argsort(stable=True, descending=True)][:MISTAKES]
    return tuple(column[order] for column in rows)


def _by_image(parts: list[Outputs]) -> Outputs:
    logits, labels, images = map(torch.cat, zip(*parts, strict=True))
    order = images.argsort(stable=True)
    return Outputs(logits[order], labels[order], images[order])
