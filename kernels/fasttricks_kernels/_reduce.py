"""What the losses' public functions share: arguments checked, lam split, rows reduced."""

from __future__ import annotations

from torch import Tensor

from . import _checks


def checked_smoothing(
    logits: Tensor,
    target: Tensor,
    target_b: Tensor | None,
    lam: Tensor | float | None,
    smoothing: float,
    smoothing_over: str,
    reduction: str,
) -> float:
    """Check what every loss takes; the smoothing over all K classes that the arguments mean."""
    _checks.check_logits("logits", logits)
    _checks.check_labels("target", target, logits)
    _checks.check_pair(target_b, lam, logits)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    return _checks.smoothing_over_all(smoothing, smoothing_over, logits.shape[1])


def split_lam(lam: Tensor | float | None) -> tuple[Tensor | None, float]:
    """lam as the operators take it: a tensor, or a number that becomes an argument of the kernel."""
    if lam is None:
        return None, 1.0
    return (lam, 1.0) if isinstance(lam, Tensor) else (None, float(lam))


def mean_weight(
    target: Tensor, target_b: Tensor | None, lam: Tensor | float | None, ignore_index: int | None
) -> Tensor | int:
    """The denominator of a mean: the weight of the labels that are not ignored, on their device."""
    if ignore_index is None:
        return target.shape[0]
    kept_N = target != ignore_index
    if target_b is None or lam is None:
        return kept_N.sum()
    return (lam * kept_N + (1 - lam) * (target_b != ignore_index)).sum()


def reduce_rows(loss_N: Tensor, reduction: str, denominator: Tensor | int) -> Tensor:
    if reduction == "none":
        return loss_N
    return loss_N.sum() / denominator if reduction == "mean" else loss_N.sum()


def grad_scale(loss_scale: Tensor | float, reduction: str, denominator: Tensor | int) -> tuple[Tensor | None, float]:
    """loss_scale, over the denominator for a mean, as (tensor or None, number): whose product scales the gradient."""
    if reduction != "mean":
        denominator = 1
    if isinstance(denominator, int):
        number = 1.0 / max(denominator, 1)  # an empty batch has no gradient to scale
        return (loss_scale, number) if isinstance(loss_scale, Tensor) else (None, loss_scale * number)
    return loss_scale / denominator, 1.0
