"""A class for each pixel: the loss of logits (N, K, H, W), and scores of whole images at any size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fasttricks.config import LossConfig
from fasttricks.data.masks.source import IGNORED
from fasttricks.learning.precision import Autocast
from fasttricks.system.transfer import to_device
from fasttricks.tasks.losses import NO_TEACHER, Targets, one_loss

_AT_ONCE = 1 << 24
"""Scores that are resized at a time: 64 MB."""


def pixel_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    masks: Tensor,
    config: LossConfig,
    *,
    aux_weight: float,
    class_weights: Tensor | None = None,
) -> Tensor:
    """The loss summed over the images of a batch, a float32 scalar: of each image the mean cross-entropy of its valid pixels.

    outputs: logits (N, K, H, W), float16, bfloat16 or float32; or (logits, logits of the auxiliary head), whose loss is added
    times aux_weight. masks: (N, H, W) int64, 0 to K - 1 or IGNORED. An image without a valid pixel, or whose pixels all weigh 0,
    has loss 0; so has N = 0. config: its smoothing counts.
    class_weights: (K,) float32, 0 or more, on the logits' device; None: all alike. The mean of an image is the weighted mean, as
    torch's `weight` has it of that image alone, so the scale of the weights has no effect. With smoothing torch weighs each term
    by the class of the term, and here a pixel has one weight, its label's.
    Deterministic, no sync. Without a copy of logits that are channels-last in memory.
    The oracle, torch's cross_entropy in float64, is in tests/test_pixels.py.
    """
    logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
    valid = (masks != IGNORED).flatten(1)
    labels = torch.where(valid, masks.flatten(1), 0)
    weights = None if class_weights is None else torch.where(valid, class_weights[labels], 0.0)
    totals = (valid if weights is None else weights).sum(1)
    totals = torch.where(totals > 0, totals, 1)

    def loss(logits: Tensor) -> Tensor:
        rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
        each = one_loss(rows, Targets(labels.flatten()), config, NO_TEACHER, "none").view_as(labels)
        each = torch.where(valid, each, 0.0)
        return ((each if weights is None else weights * each).sum(1) / totals).sum()

    return loss(logits) if auxiliary is None else loss(logits) + aux_weight * loss(auxiliary)


@torch.no_grad()
def pixel_scores(
    model: nn.Module,
    images: Tensor,
    *,
    scales: Sequence[float] = (),
    flip: bool = False,
    autocast: Autocast = nullcontext,
) -> Tensor:
    """Float32 logarithms of probabilities (N, K, H, W) of `images` (N, 3, H, W), by `model` in evaluation mode.

    The probabilities are the mean over the sizes that `scales` are factors of, empty: 1 alone; and with flip over the mirror
    image of each too.
    """
    total: Tensor | None = None
    views = [(factor, mirrored) for factor in scales or (1.0,) for mirrored in ((False, True) if flip else (False,))]
    for factor, mirrored in views:
        size = [max(1, round(side * factor)) for side in images.shape[-2:]]
        seen = images if factor == 1 else _resize(images.float(), size, antialias=True).to(images.dtype)
        with autocast():
            logits: Tensor = model(seen.flip(3) if mirrored else seen)
        logits = _resize(logits.float().flip(3) if mirrored else logits.float(), images.shape[-2:])
        scores = logits.log_softmax(1)
        total = scores if total is None else torch.logaddexp(total, scores)
    assert total is not None
    return total if len(views) == 1 else total - math.log(len(views))


def _resize(maps: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    if maps.shape[-2:] == torch.Size(size):
        return maps
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)


def resized_in_bands(scores: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, the scores (N, K, rows, width) there) of `scores` (N, K, h, w) resized to (height, width), from top to bottom.

    As interpolate() resizes, bilinearly, in a memory that does not grow with the height: a large image of 150 classes has
    gigabytes of scores. The oracle, interpolate() itself, is in tests/test_pixels.py.
    """
    count, classes, rows, columns = scores.shape
    if (rows, columns) == (height, width):
        yield slice(0, height), scores
        return
    at_once = max(1, _AT_ONCE // max(1, count * classes * width))
    for first in range(0, height, at_once):
        band = range(first, min(first + at_once, height))
        places = [max(0.0, (row + 0.5) * rows / height - 0.5) for row in band]
        above = [min(int(place), rows - 1) for place in places]
        below = [min(row + 1, rows - 1) for row in above]
        share = torch.tensor([place - row for place, row in zip(places, above, strict=True)], dtype=torch.float32)
        numbers = torch.tensor([above, below]) - above[0]
        share, numbers = to_device(share[:, None], scores.device), to_device(numbers, scores.device)
        wide = _resize(scores[:, :, above[0] : below[-1] + 1], (below[-1] + 1 - above[0], width))
        resized = torch.lerp(wide.index_select(2, numbers[0]), wide.index_select(2, numbers[1]), share)
        yield slice(band.start, band.stop), resized
