"""torch.func's transforms (grad, vmap, jvp) and forward-mode AD: they pass an operator of ours by, so plain PyTorch serves there.

Without this, forward mode took a loss for a constant: a derivative of 0, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed(*values: Any) -> bool:
    """Whether a transform of torch.func is at work, or one of the tensors has a tangent of forward mode."""
    # torch.autograd.Function asks it in each of its calls
    return torch._C._are_functorch_transforms_active() or _has_tangent(values)


def differentiated(*tensors: Tensor) -> bool:
    """Whether a transform differentiates by one of the tensors."""
    return _has_tangent(tensors) or any(_is_tracked(tensor) for tensor in tensors)


def is_batched(tensor: Tensor) -> bool:
    """Whether it is many tensors at once, by the vmap of torch.autograd.grad(is_grads_batched=True)."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def untransformed(tensor: Tensor) -> Tensor:
    """The tensor under all wrappers of torch.func: its values, with the dimensions that vmap hides."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _has_tangent(values: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values)


def _is_tracked(tensor: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
