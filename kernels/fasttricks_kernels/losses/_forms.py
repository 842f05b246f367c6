"""Which arguments of torch's cross-entropy the fused one takes; all others go to torch's operator, which takes or refuses them.

Shape suffixes: N samples, K classes, P pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._checks import FLOATS, LABELS, weight_dtypes
from .._launch import BLOCK, INTERPRETED


def fuses(
    input: Any, target: Any, weight: Any, reduction: str, label_smoothing: float, ignore_index: int | None = -100
) -> bool:
    """Logits, each row or pixel with a label or targets, on one device, and options in range. Reads no value on a device."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return False
    if has_torch_function_variadic(input, target) or input.device != target.device:
        return False
    if input.dtype not in FLOATS or not (fits(input, target) or fits_densely(input, target, ignore_index)):
        return False
    if weight is not None and not weighs(weight, input):
        return False
    if weight is not None and target.is_floating_point() and weight.shape[0] > BLOCK and may_run_triton(input):
        return False  # a kernel of them spills
    return label_smoothing <= 1 and reduction in ("mean", "sum", "none")


def fits(input: Tensor, target: Tensor) -> bool:
    """(N, K) and (N,), (K,) and (), or (N, K, d1, ...) and (N, d1, ...), with a class at least."""
    if target.dtype not in LABELS:
        return False
    if input.dim() < 2:
        return input.dim() == 1 and target.dim() == 0 and input.shape[0] > 0
    return target.shape == input.shape[:1] + input.shape[2:] and input.shape[1] > 0


def fits_densely(input: Tensor, target: Tensor, ignore_index: int | None) -> bool:
    """Targets of the logits' shape; of planes on the CPU alone. torch refuses them an ignore_index >= 0."""
    if target.shape != input.shape or target.dtype not in weight_dtypes(input):
        return False
    if input.dim() == 0 or input.shape[min(1, input.dim() - 1)] == 0 or ignore_index is None or ignore_index >= 0:
        return False
    return input.dim() <= 2 or input.movedim(1, -1).is_contiguous() or not may_run_triton(input)


def may_run_triton(input: Tensor) -> bool:
    """On a GPU, or interpreted."""
    return not input.is_cpu or INTERPRETED


def in_rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) logits with (N,) labels where classes lie side by side in memory, else (N, K, P) with (N, P).

    Targets of the logits' shape as the logits. Views, where the strides allow.
    """
    dense = target.is_floating_point()
    if input.dim() == 2:
        return input, target
    if input.dim() == 1:
        return input.unsqueeze(0), target.unsqueeze(0)
    rows = input.movedim(1, -1)
    if rows.is_contiguous():
        return rows.flatten(0, -2), target.movedim(1, -1).flatten(0, -2) if dense else target.flatten()
    return input.flatten(2), target.flatten(2 if dense else 1)


def weighs(weight: Any, input: Tensor) -> bool:
    """(K,) class weights on the logits' device that need no gradient."""
    if not isinstance(weight, Tensor) or has_torch_function_variadic(weight) or weight.requires_grad:
        return False
    classes = input.shape[min(1, input.dim() - 1) :][:1]
    return weight.shape == classes and weight.device == input.device and weight.dtype in weight_dtypes(input)
