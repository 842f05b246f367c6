"""Whether a call needs torch's dispatcher. An operator called from Python costs 100 us; an eager call goes past it.

torch.compile, export, tracing, torch.func, fake tensors, subclasses and modes of Python need the operator to see the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad
from torch.library import CustomOpDef

Result = TypeVar("Result")
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_PLAIN = set(PLAIN_TYPES)


def _bits(*keys: Any) -> int:
    bits = 0
    for key in keys:
        bits |= DispatchKeySet(key).raw_repr()
    return bits


# A tensor with another key is fake, wrapped by a transform, sparse, on another device, or its memory is not its values
# (a negative view, a zero without memory).
OTHER_KEYS = ~_bits(
    *(DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.AutocastCPU),
    *(DispatchKey.CUDA, DispatchKey.AutogradCUDA, DispatchKey.AutocastCUDA),
    DispatchKey.ADInplaceOrView,
)
# A mode of Python, a tracer, a transform and functionalization each include a key of their own in the thread's.
OTHER_THREAD_KEYS = ~_bits(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors on a CPU or GPU, and nothing but autograd watches the call."""
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() & OTHER_THREAD_KEYS
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TYPES or torch._C._dispatch_keys(tensor).raw_repr() & OTHER_KEYS:
            return False
    return True


def lists_run_directly(*lists: Sequence[Tensor]) -> bool:
    """As runs_directly, for hundreds of tensors, dense in memory and all on one device: a third of its time.

    A tensor of a transform has no memory, and raises an error where its address is asked for. Two kinds
    would be read wrongly: a negative view, and a zero without memory.
    """
    tensors = [*chain(*lists)]
    return (
        runs_directly(tensors[0])
        and not torch.is_inference_mode_enabled()
        and _PLAIN.issuperset(map(type, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(Tensor._is_zerotensor, tensors))
    )


def past_dispatcher(operator: CustomOpDef, body: Callable[..., Result]) -> Callable[..., Result]:
    """The operator; its body alone where no gradient is asked for and nobody needs the operator. Both by position."""

    def either(*arguments: Any) -> Result:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or not runs_directly(*tensors):
            return operator(*arguments)
        return body(*arguments)

    return either
