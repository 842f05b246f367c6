"""Softmax cross-entropy with label smoothing and mixup's pair of labels."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import reference


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.0,
    target_b: Tensor | None = None,
    lam: Tensor | float | None = None,
    ignore_index: int | None = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    smoothing_over: Literal["all", "others"] = "all",
) -> Tensor:
    """Cross-entropy of (N, K) logits against N labels, or against mixup's two labels a row."""
    if smoothing_over == "others":
        smoothing = smoothing * logits.shape[1] / (logits.shape[1] - 1)
    lam = 1.0 if lam is None else lam
    loss = reference.cross_entropy(logits, target, target_b, lam, smoothing=smoothing, ignore_index=ignore_index)
    if reduction == "none":
        return loss
    if reduction == "sum" or ignore_index is None:
        return loss.sum() if reduction == "sum" else loss.mean()
    return loss.sum() / reference.label_weight(target, target_b, lam, ignore_index).sum()
