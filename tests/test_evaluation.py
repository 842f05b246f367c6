"""Counts against torch.topk, torchmetrics and a slow oracle; the metrics do not depend on how the images are cut into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttricks.data.batch import Batch
from fasttricks.system.distributed import World
from fasttricks.tasks.classification import CLASSIFICATION, count_correct, evaluate

WORLD = World.alone(torch.device("cpu"))
nan, inf = float("nan"), float("inf")


def oracle(logits: Tensor, labels: Tensor) -> list[int]:
    """A stable sort of every row by hand: the largest first, of equal ones the lower class first; NaN is wrong."""
    right = [0] * 5
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda k: (-row[k], k))
        if not np.isnan(row).any():
            for k in range(1, 6):
                right[k - 1] += label in order[:k]
    return right


# --------------------------------------------------------------------------------------------------- count_correct


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 1000])
def test_counts_are_those_of_topk(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(200, classes, generator=generator)
    labels = torch.randint(classes, (200,), generator=generator)
    hits = [logits.topk(min(k, classes)).indices == labels[:, None] for k in (1, 2, 3, 4, 5)]
    assert count_correct(logits, labels).tolist() == [int(hit.sum()) for hit in hits]
    assert count_correct(logits, labels).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties_go_to_the_lower_class(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (300, 9), generator=generator).to(dtype)
    labels = torch.randint(9, (300,), generator=generator)
    assert count_correct(logits, labels).tolist() == oracle(logits, labels)
    assert count_correct(torch.zeros(9, 9), torch.arange(9)).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("classes", [3, 5, 8])
def test_an_image_with_a_nan_is_wrong(classes: int) -> None:
    """Also for k >= K, where any other label is among the first k."""
    for place in range(classes):
        logits = torch.eye(classes)
        logits[1, place] = nan
        labels = torch.arange(classes)
        assert count_correct(logits, labels).tolist() == [classes - 1] * 5 == oracle(logits, labels)
    assert count_correct(torch.full((4, classes), nan), torch.zeros(4, dtype=torch.int64)).tolist() == [0] * 5


def test_infinities_are_ordered() -> None:
    logits = torch.tensor([[inf, 0.0, -inf], [inf, inf, 0.0], [-inf, -inf, -inf]])
    assert count_correct(logits, torch.tensor([0, 0, 0])).tolist() == [3] * 5
    assert count_correct(logits, torch.tensor([1, 1, 1])).tolist() == [0, 3, 3, 3, 3]


def test_no_images_count_nothing() -> None:
    assert count_correct(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64)).tolist() == [0] * 5


# -------------------------------------------------------------------------------------------------------- evaluate


class Readout(nn.Module):
    """Logits that no batch size can round differently: an image's first K pixels, times the batch norm of eval mode."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.norm = nn.BatchNorm1d(classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.norm(images.flatten(1)[:, : self.classes])
        return logits


def data(count: int = 23, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.randint(classes, (count,), generator=generator)


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[Batch]:
    """`size` images each, the last of what is left, with an empty batch before, between and after, as a rank can get."""
    yield Batch(images[:0], labels[:0])
    for at in range(0, len(labels), size):
        yield Batch(images[at : at + size], labels[at : at + size])
        yield Batch(images[:0], labels[:0])


@pytest.mark.parametrize("size", [1, 2, 5, 22, 23, 64])
@pytest.mark.parametrize("flip", [False, True])
def test_metrics_are_exact_whatever_the_batch_size(size: int, flip: bool) -> None:
    images, labels = data()
    model = Readout(7).train()
    got = evaluate(model, batches(images, labels, size), WORLD, flip=flip)
    model.eval()
    logits = model(images).detach()
    if flip:
        logits = (logits + model(torch.from_numpy(images.numpy()[:, :, :, ::-1].copy())).detach()) / 2
    top1, *_, top5 = oracle(logits, labels)
    loss = F.cross_entropy(logits.double(), labels).item()
    want = {"top1": 100 * top1 / 23, "top5": 100 * top5 / 23, "val_images": 23}
    assert got == {**want, "val_loss": pytest.approx(loss, rel=1e-12)}
    assert 0 < top1 < top5 < 23


@pytest.mark.parametrize(
    ("classes", "tops"),
    [(1, [1]), (2, [1]), (3, [1, 2]), (4, [1, 3]), (5, [1, 4]), (6, [1, 5]), (10, [1, 5]), (1000, [1, 5])],
)
def test_the_metrics_are_those_of_the_number_of_classes(classes: int, tops: list[int]) -> None:
    """None is 100 % of every network: top-1, and top-min(5, K - 1) where that is another. Held against torchmetrics and topk."""
    from torchmetrics.functional.classification import multiclass_accuracy

    generator = torch.Generator().manual_seed(classes)
    images = torch.randn(300, 3, 20, 20, generator=generator)
    labels = torch.randint(classes, (300,), generator=generator)
    found = evaluate(Readout(classes), batches(images, labels, 64), WORLD)
    assert list(found) == [*(f"top{k}" for k in tops), "val_loss", "val_images"]
    assert [metric.name for metric in CLASSIFICATION.metrics_of(classes)] == list(found)[:-2]
    assert [metric.label for metric in CLASSIFICATION.metrics_of(classes)] == [f"top-{k}" for k in tops]
    logits = Readout(classes).eval()(images).detach().double()
    for k in tops if classes > 1 else []:
        right = int((logits.topk(k).indices == labels[:, None]).sum())
        theirs = multiclass_accuracy(logits, labels, classes, average="micro", top_k=k)
        assert found[f"top{k}"] == 100 * right / 300 < 100
        assert found[f"top{k}"] == pytest.approx(100 * float(theirs))


def rank(own: list[Tensor], others: Sequence[Tensor] = ()) -> Any:
    """A World that keeps what it is given to sum in `own`, and adds what the other rank gave."""
    left = iter(others)

    def sum_(tensor: Tensor) -> Tensor:
        own.append(tensor.clone())
        return tensor.add_(next(left, torch.zeros_like(tensor)))

    return SimpleNamespace(device=WORLD.device, sum_=sum_)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_a_rank_without_images_names_the_same_metrics(classes: int) -> None:
    images, labels = data(classes=classes)
    full: list[Tensor] = []
    wanted = evaluate(Readout(classes), batches(images, labels, 8), rank(full))
    empty: list[Tensor] = []
    assert evaluate(Readout(classes), batches(*data(0), 8), rank(empty, full)) == wanted
    assert evaluate(Readout(classes), batches(images, labels, 8), rank([], empty)) == wanted


def test_flip_changes_the_result() -> None:
    images, labels = data()
    plain = evaluate(Readout(7), batches(images, labels, 8), WORLD)
    assert evaluate(Readout(7), batches(images, labels, 8), WORLD, flip=True) != plain


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_nothing_is_learnt(training: bool) -> None:
    images, labels = data()
    model = Readout(7).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, batches(images, labels, 8), WORLD)
    assert model.training == model.norm.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_forward_pass_runs_under_autocast_and_the_loss_does_not() -> None:
    images, labels = data()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 7))
    seen = []
    model.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    got = evaluate(
        model, batches(images, labels, 8), WORLD, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    assert set(seen) == {torch.bfloat16}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = F.cross_entropy(model(images).double(), labels).item()
    assert got["val_loss"] == pytest.approx(want, rel=1e-3)


def test_a_nan_model_gets_nothing_right() -> None:
    images, labels = data(classes=3)
    model = Readout(3)
    nn.init.constant_(model.norm.weight, nan)
    got = evaluate(model, batches(images, labels, 8), WORLD)
    assert (got["top1"], got["top2"], got["val_images"]) == (0, 0, 23)
    assert np.isnan(got["val_loss"])


def test_no_image_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        evaluate(Readout(7), batches(*data(0), 8), WORLD)
