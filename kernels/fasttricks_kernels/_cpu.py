"""Cross-entropy of checked labels on the CPU: reference.py's values, by one exponential and few small operations.

At 256 x 1000 on one core (AMD EPYC, AVX2) an exp over the N K elements costs 265 us, any other pass over them 20 to 30, a
small operation 3 to 10. So losses and gradient are made together, in one buffer, and all that is left for backward is one
multiplication; torch takes the exponentials once forward, and again backward.

Shape suffixes: N samples, K classes, L labels of a sample (1, or mixup's 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._options import Labels
from .reference import wide


def checked(labels: Labels, num_classes: int) -> Labels:
    """The labels, their values checked; without an ignore_index that none is. Reads values: inside an operator only."""
    used = None
    for name, labels_N in (("target", labels.target), ("target_b", labels.target_b)):
        if labels_N is None or not labels_N.numel():
            continue
        low, high = (int(value) for value in labels_N.aminmax())
        if low < 0 or high >= num_classes:
            _checks.check_label_values(name, labels_N, num_classes, labels.ignore_index)
        if labels.ignore_index is not None and low <= labels.ignore_index <= high:
            used = labels.ignore_index
    return labels._replace(ignore_index=used)


def _labels_and_weights(labels: Labels, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, L) labels that can index, and their weights: (N, L), or (L,) where every sample has the same, none of them 0."""
    target_N, target_b_N, share = labels.target, labels.target_b, labels.share
    if target_b_N is not None and not isinstance(share, Tensor) and share in (0, 1):  # the other label does not count
        target_N, target_b_N = target_N if share else target_b_N, None
    if target_b_N is None:
        labels_NL, weights = target_N[:, None], torch.ones(1, dtype=dtype)
    else:
        labels_NL = torch.stack([target_N, target_b_N], 1)
        if isinstance(share, Tensor):
            weights = torch.stack([share, 1 - share], -1).to(dtype).expand_as(labels_NL)
        else:
            weights = torch.tensor([share, 1 - share], dtype=dtype)
    labels_NL = labels_NL.long()
    if labels.ignore_index is not None:
        ignored_NL = labels_NL == labels.ignore_index
        labels_NL, weights = labels_NL.masked_fill(ignored_NL, 0), weights.masked_fill(ignored_NL, 0)
    return labels_NL, weights


def cross_entropy(logits_NK: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """(N,) losses, and (N, K) the gradient of their sum: W p - q, in the losses' dtype."""
    num_classes, smoothing = logits_NK.shape[1], labels.smoothing
    labels = checked(labels, num_classes)
    x_NK = wide(logits_NK)
    x_NK = x_NK - x_NK.amax(1, keepdim=True)
    labels_NL, weights = _labels_and_weights(labels, x_NK.dtype)

    # The sum is of q (x - max), as in the kernel: at logits of 6e4 a sum of q x would leave no digits for the loss.
    picked_NL, uniform_N = x_NK.gather(1, labels_NL), x_NK.sum(1) if smoothing else 0  # mean(1) takes 2.5 x as long
    sum_N = x_NK.exp_().sum(1)
    loss_N, grad_NK = sum_N.log(), x_NK
    if weights.dim() == 1:
        cross_N = picked_NL @ weights
        grad_NK.mul_(sum_N.reciprocal_()[:, None])
        if smoothing:
            grad_NK.sub_(smoothing / num_classes)
    else:  # 0 and not 0 * -inf: a weight of 0 is a label that does not count
        total_N = weights.sum(1)
        none_N = total_N == 0
        cross_N = torch.where(weights == 0, 0, picked_NL * weights).sum(1)
        loss_N.mul_(total_N).masked_fill_(none_N, 0)
        grad_NK.mul_((total_N / sum_N)[:, None])
        if smoothing:
            uniform_N = torch.where(none_N, 0, total_N * uniform_N)
            grad_NK.sub_((smoothing / num_classes * total_N)[:, None])
        grad_NK.masked_fill_(none_N[:, None], 0)
    if smoothing:
        cross_N = torch.add((1 - smoothing) * cross_N, uniform_N, alpha=smoothing / num_classes)
    grad_NK.scatter_add_(1, labels_NL, ((smoothing - 1) * weights).expand_as(labels_NL))
    return loss_N.sub_(cross_N), grad_NK


def scaled(grad_NK: Tensor, scale_N: Tensor, labels: Labels, dtype: torch.dtype) -> Tensor:
    """The gradient of cross_entropy times a number a row, rounded once to `dtype`; 0, and not 0 * inf, in ignored rows."""
    if labels.ignore_index is not None:
        _, weights_NL = _labels_and_weights(labels, grad_NK.dtype)
        scale_N = torch.where(weights_NL.sum(1) == 0, 0, scale_N)
    return (grad_NK * scale_N[:, None]).to(dtype)
