"""Which arguments of torch's cross-entropy the fused one takes; all others go to torch's operator, which takes or refuses them.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._checks import FLOATS, LABELS, weight_dtypes


def fuses(input: Any, target: Any, weight: Any, reduction: str, label_smoothing: float) -> bool:
    """(N, K) logits with N labels, on one device, and options in range. Reads no value on a device."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return False
    if has_torch_function_variadic(input, target) or input.device != target.device:
        return False
    if input.dim() != 2 or input.dtype not in FLOATS or input.shape[1] == 0 or target.dtype not in LABELS:
        return False
    if weight is not None and not weighs(weight, input):
        return False
    return target.shape == input.shape[:1] and label_smoothing <= 1 and reduction in ("mean", "sum", "none")


def weighs(weight: Any, input: Tensor) -> bool:
    """(K,) class weights on the logits' device that need no gradient."""
    if not isinstance(weight, Tensor) or has_torch_function_variadic(weight) or weight.requires_grad:
        return False
    return weight.shape == input.shape[1:2] and weight.device == input.device and weight.dtype in weight_dtypes(input)
