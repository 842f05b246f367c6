"""The maths of every kernel in plain PyTorch: slow, short, differentiable, and right on any device and dtype.

This is the one definition. The Triton kernels and the faster CPU paths are tested against it; it is itself tested
against torch.nn.functional, torch.optim.SGD, NumPy and PIL.

Shape suffixes: N samples, K classes, C channels, H rows, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that its arithmetic is done in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(
    logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Tensor | None = None,
    lam: Tensor | float = 1.0,
    *,
    smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """Cross-entropy of each row: lam * ce(target) + (1 - lam) * ce(target_b), with

        ce(y) = -(1 - smoothing) * log p_y - smoothing * mean_k log p_k,    p = softmax(logits).

    A label equal to `ignore_index` adds 0; any other label outside [0, K) makes its row NaN.
    """
    log_p_NK = F.log_softmax(wide(logits_NK), dim=1)
    loss_N = _label_cross_entropy(log_p_NK, target_N, smoothing, ignore_index)
    if target_b_N is None:
        return loss_N
    return lam * loss_N + (1 - lam) * _label_cross_entropy(log_p_NK, target_b_N, smoothing, ignore_index)


def _label_cross_entropy(log_p_NK: Tensor, target_N: Tensor, smoothing: float, ignore_index: int | None) -> Tensor:
    known_N = (target_N >= 0) & (target_N < log_p_NK.shape[1])
    label_N = torch.where(known_N, target_N, 0).long()
    loss_N = -log_p_NK.gather(1, label_N[:, None])[:, 0]
    if smoothing:
        loss_N = (1 - smoothing) * loss_N - smoothing * log_p_NK.mean(1)
    loss_N = torch.where(known_N, loss_N, torch.nan)
    return loss_N if ignore_index is None else torch.where(target_N == ignore_index, 0, loss_N)


def label_weight(
    target_N: Tensor, target_b_N: Tensor | None, lam: Tensor | float, ignore_index: int | None
) -> Tensor | float:
    """What each row weighs in a mean: the share of its labels that are not ignored (1 where none is)."""
    if ignore_index is None:
        return 1.0
    kept_N = (target_N != ignore_index).float()
    if target_b_N is None:
        return kept_N
    return lam * kept_N + (1 - lam) * (target_b_N != ignore_index).float()


def mixup(images_NCHW: Tensor, permutation_N: Tensor, lam: Tensor | float) -> Tensor:
    """lam * images + (1 - lam) * images[permutation], in float32 (float64 for float64), rounded once."""
    lam_N111 = lam[:, None, None, None] if isinstance(lam, Tensor) and lam.dim() else lam
    mixed = lam_N111 * wide(images_NCHW) + (1 - lam_N111) * wide(images_NCHW[permutation_N])
    return mixed.to(images_NCHW.dtype)
