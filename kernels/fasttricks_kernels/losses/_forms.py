"""Which arguments of torch's cross-entropy the fused one takes; all others go to torch's operator, which takes or refuses them.

Shape suffixes: N samples, K classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._checks import FLOATS, LABELS


def fuses(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, label_smoothing: float) -> bool:
    """(N, K) logits with N labels, on one device, and options in range. Reads no value on a device."""
    if weight is not None or not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return False
    if has_torch_function_variadic(input, target) or input.device != target.device:
        return False
    if input.dim() != 2 or input.dtype not in FLOATS or input.shape[1] == 0 or target.dtype not in LABELS:
        return False
    return target.shape == input.shape[:1] and label_smoothing <= 1 and reduction in ("mean", "sum", "none")
