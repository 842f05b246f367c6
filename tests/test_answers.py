"""Answers against torchmetrics and a float64 twin in numpy; the same whatever the batches, the ranks and their order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttricks.data.batch import Batch
from fasttricks.system.distributed import World
from fasttricks.tasks.answers import BINS, MISTAKES, Answered, Answers
from fasttricks.tasks.classification import count_correct, evaluate
from lib.syncs import NoHostCopy, NoHostSync
from lib.threads import Threads, ranks

CPU = torch.device("cpu")
ALONE = World.alone(CPU)
nan, inf = float("nan"), float("inf")


def data(count: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often than not, on a grid, so that ties and equal confidences come about; labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) * 2 + 2 * nn.functional.one_hot(labels, classes)
    return (logits * 4).round() / 4, labels


def answer(logits: Tensor, labels: Tensor, size: int = 64, classes: int | None = None) -> Answered:
    answers = Answers(classes or logits.shape[1], CPU)
    for at in range(0, len(labels), size):
        part = slice(at, at + size)
        answers.update(logits[part], labels[part], np.arange(len(labels))[part])
    return answers.result(ALONE)


def twin(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """By one image at a time, in float64."""
    classes = logits.shape[1]
    confusion, undecided = np.zeros((classes, classes), dtype=int), np.zeros(classes, dtype=int)
    count, right, sums, wrong, nll = [0] * BINS, [0] * BINS, [0.0] * BINS, [], []
    for image, (row, label) in enumerate(zip(logits.double().numpy(), labels.tolist(), strict=True)):
        if np.isnan(row).any():
            undecided[label] += 1
            nll.append(nan)
            continue
        predicted = min(range(classes), key=lambda k: (-row[k], k))
        shares = np.exp(row - row.max())
        confidence = 1 / shares.sum()
        nll.append(-np.log(shares[label] / shares.sum()))
        confusion[label, predicted] += 1
        b = next(b for b in range(BINS) if confidence <= (b + 1) / BINS or b == BINS - 1)
        count[b] += 1
        right[b] += predicted == label
        sums[b] += confidence
        if predicted != label:
            wrong.append((-confidence, image, label, predicted))
    wrong = sorted((round(c, 12), *rest) for c, *rest in wrong)[:MISTAKES]
    return {"confusion": confusion, "undecided": undecided, "bins": (count, right, sums), "wrong": wrong, "nll": nll}


def check(found: Answered, want: dict[str, Any]) -> None:
    assert (found.confusion == want["confusion"]).all() and found.confusion.dtype == np.int64
    assert found.undecided.tolist() == want["undecided"].tolist()
    count, right, sums = want["bins"]
    assert found.bin_count.tolist() == count and found.bin_right.tolist() == right
    np.testing.assert_allclose(found.bin_confidence, sums, rtol=1e-10, atol=1e-10)
    gaps = [abs(r - s) for r, s in zip(right, sums, strict=True)]
    assert found.ece == pytest.approx(sum(gaps) / sum(count), rel=1e-10)
    assert found.nll == pytest.approx(np.mean(want["nll"]), rel=1e-10, nan_ok=True)
    rows = zip(*(part.tolist() for part in found.mistakes), strict=True)
    assert sorted((round(-c, 12), i, t, p) for i, t, p, c in rows) == want["wrong"]


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 10, 300])
def test_answers_are_those_of_torchmetrics_and_of_the_twin(classes: int) -> None:
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

    logits, labels = data(700, classes)
    found = answer(logits, labels)
    check(found, twin(logits, labels))
    shares = logits.double().softmax(1)
    by_torchmetrics = MulticlassConfusionMatrix(classes)(shares, labels)
    assert (found.confusion == by_torchmetrics.numpy()).all()
    assert found.ece == pytest.approx(MulticlassCalibrationError(classes, n_bins=BINS)(shares, labels).item(), rel=1e-5)
    accuracy = MulticlassAccuracy(classes, average=None)(shares, labels).double().numpy()
    there = found.seen > 0
    np.testing.assert_allclose(found.accuracy[there], accuracy[there], rtol=1e-6)
    assert np.isnan(found.accuracy[~there]).all()
    assert found.right.sum() == count_correct(logits, labels)[0] and found.seen.sum() == 700
    assert (0 < found.right.sum() < 700 and len(found.mistakes.images) == MISTAKES) or classes == 2


def test_half_precision_logits_are_judged_as_they_are() -> None:
    logits, labels = data(200, 6)
    for dtype in (torch.float16, torch.bfloat16):
        check(answer(logits.to(dtype), labels), twin(logits.to(dtype), labels))


@pytest.mark.parametrize("size", [1, 7, 400])
def test_the_batches_change_no_bit(size: int) -> None:
    logits, labels = data(400, 7)
    found, whole = answer(logits, labels, size), answer(logits, labels, 400)
    assert found.nll == pytest.approx(whole.nll, rel=1e-12)
    for name in ("confusion", "undecided", "bin_count", "bin_right", "bin_confidence"):
        assert (getattr(found, name) == getattr(whole, name)).all(), name
    for ours, theirs in zip(found.mistakes, whole.mistakes, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_mistakes_are_the_most_confident_first_and_of_equal_ones_the_lower_image() -> None:
    logits = torch.zeros(200, 3)
    logits[:, 1] = torch.tensor([1.0, 2.0] * 100)
    found = answer(logits, torch.zeros(200, dtype=torch.int64), 9).mistakes
    assert found.images.tolist() == list(range(1, 100, 2))
    assert set(found.true.tolist()) == {0} and set(found.predicted.tolist()) == {1}
    few = answer(logits[:3], torch.tensor([0, 1, 2])).mistakes
    assert few.images.tolist() == [0, 2] and few.confidence[0] == few.confidence[1]


def test_an_image_with_a_nan_is_wrong_and_counted() -> None:
    logits, labels = data(60, 4)
    logits[::5, 2] = nan
    found = answer(logits, labels, 16)
    check(found, twin(logits, labels))
    assert found.undecided.sum() == 12 and found.seen.sum() == 60 and found.bin_count.sum() == 48
    assert found.right.sum() == count_correct(logits, labels)[0]
    nothing = answer(torch.full((4, 3), nan), torch.tensor([0, 0, 1, 2]))
    assert nothing.accuracy.tolist() == [0, 0, 0] and np.isnan(nothing.ece) and not len(nothing.mistakes.images)


def test_infinite_logits_have_the_confidence_of_the_limit() -> None:
    logits = torch.tensor([[inf, 0.0, -inf], [inf, inf, 0.0], [-inf, -inf, -inf]])
    found = answer(logits, torch.tensor([0, 1, 1]))
    assert found.confusion.tolist() == [[1, 0, 0], [2, 0, 0], [0, 0, 0]]
    assert found.mistakes.confidence.tolist() == [1 / 2, pytest.approx(1 / 3)]
    assert found.bin_count[[BINS - 1, 7, 4]].tolist() == [1, 1, 1]


def test_a_confidence_of_one_is_in_the_last_bin_and_an_edge_in_the_bin_below_it() -> None:
    found = answer(torch.tensor([[900.0, 0, 0], [0, 0, 0]]), torch.tensor([0, 0]))
    assert found.bin_count.tolist() == [0, 0, 0, 0, 1, *[0] * 9, 1]  # 1/3 = 5/15 ends bin 4


def test_update_does_not_wait_for_the_device() -> None:
    logits, labels = data(30, 4)
    answers, numbers = Answers(4, CPU), np.arange(30)
    with NoHostSync(), NoHostCopy():
        for _ in range(3):
            answers.update(logits, labels, numbers)
    with pytest.raises(AssertionError, match="waits"), NoHostCopy():
        Answers(4, CPU, keep_logits=True).update(logits, labels, numbers)


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        Answers(3, CPU).result(ALONE)


# ------------------------------------------------------------------------------------------------------------ ranks


class Picture(nn.Module):
    """The logits of an image are its first pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_ranks_give_the_answers_of_one(size: int, classes: int) -> None:
    """One of three has but one image and an empty batch; evaluate() fills them in its own pass.

    The images come in another order, and each twice, so that equal mistakes are told apart by the image alone.
    """
    logits, labels = data(101, classes)
    logits[50:100], labels[50:100] = logits[:50], labels[:50]
    order = np.random.default_rng(3).permutation(101)
    pixels = logits[:, :, None, None].expand(-1, -1, 1, 1)
    parts = (
        [range(101)]
        if size == 1
        else [range(60), range(60, 101)]
        if size == 2
        else [range(100), range(0), range(100, 101)]
    )

    def rank(world: Threads) -> tuple[Any, Any, Any]:
        answers = Answers(classes, CPU, keep_logits=True)
        numbers = order[np.array(parts[world.rank], dtype=np.int64)]
        batches = [Batch(pixels[n], labels[n], n, n) for at in range(0, 101, 16) for n in [numbers[at : at + 16]]]
        return evaluate(Picture(), batches, world, answers=answers), answers.result(world), answers.outputs(world)

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(rank, ranks(size)))
    want = answer(logits, labels)
    for metrics, answered, _ in found:
        check(answered, twin(logits, labels))
        assert (answered.bin_confidence == want.bin_confidence).all()
        assert [part.tolist() for part in answered.mistakes] == [part.tolist() for part in want.mistakes]
        assert metrics["top1"] == pytest.approx(100 * answered.right.sum() / 101)
        assert metrics["val_loss"] == pytest.approx(answered.nll)
    (outputs, *others) = [one[2] for one in found]
    assert all(other is None for other in others)
    assert torch.equal(outputs.logits, logits) and torch.equal(outputs.labels, labels)
    assert outputs.images.tolist() == list(range(101))


def test_answers_need_the_images_numbers_and_outputs_their_logits() -> None:
    logits, labels = data(4, 3)
    with pytest.raises(ValueError, match="numbers"):
        evaluate(Picture(), [Batch(logits[:, :, None, None], labels)], ALONE, answers=Answers(3, CPU))
    with pytest.raises(ValueError, match="keep_logits"):
        Answers(3, CPU).outputs(ALONE)
