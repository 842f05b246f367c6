"""Validation: exact sums over each image once, whatever the batch size and the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttricks.data.batch import Batch
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World

_PANEL = "Validation accuracy", "images classified right (%)"
METRICS = (Metric("top1", "top-1", "%", _PANEL), Metric("top5", "top-5", "%", _PANEL))
"""The first is the headline: what runs are compared by."""


class Metrics(NamedTuple):
    """Validation over `images` images: top1 and top5 in percent, loss as the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Images whose label is the first, and among the first five, of the logits: int64 (2,), on the logits' device.

    logits: (N, K); labels: (N,) int64. With K < 5 classes all K count for the second. Among equal logits the lower class
    comes first. An image with a NaN among its logits is wrong twice. No sync.
    """
    target = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ahead = (logits > target) | ((logits == target) & (classes < labels[:, None]))
    valid = ~logits.isnan().any(1)
    rank = ahead.sum(1)
    return torch.stack([((rank < 1) & valid).sum(), ((rank < 5) & valid).sum()])


def evaluation_logits(
    model: nn.Module,
    images: Tensor,
    *,
    flip: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """Float32 logits (N, K) of `images`; flip: the mean of theirs and their mirror images'."""
    with autocast():
        logits: Tensor = model(images).float()
        return (logits + model(images.flip(3)).float()) / 2 if flip else logits


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    *,
    flip: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Metrics:
    """Top-1, top-5 and mean loss of `model`, in eval mode, over `batches` of this rank and those of all others.

    Counts are integers and the loss is summed in float64, so neither batch size nor ranks change them. flip: average the
    logits of an image and its mirror image. The model's mode is put back. Two collectives and one sync, at the end.
    Raises ValueError where no rank has an image.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    was_training = model.training
    model.eval()
    for batch in batches:
        if not len(batch):
            continue
        logits = evaluation_logits(model, batch.images, flip=flip, autocast=autocast)
        loss += functional.cross_entropy(logits.double(), batch.labels, reduction="sum")
        counts[:2] += count_correct(logits, batch.labels)
        counts[2] += len(batch)
    model.train(was_training)
    world.sum_(counts)
    world.sum_(loss)
    top1, top5, images_seen = counts.tolist()
    if not images_seen:
        raise ValueError("evaluate() got no image on any rank; scan_dataset refuses an empty val/ before this")
    return Metrics(100 * top1 / images_seen, 100 * top5 / images_seen, loss.item() / images_seen, images_seen)
