"""A card that is not there: tensors that say they lie on cuda:0 and keep their values on the host.

An operator on tensors of two devices is refused as torch refuses it, which fake tensors do not do for scalars in a list. No
backward pass: autograd would want the card's streams. Kernels run as their reference, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CARD = torch.device("cuda", 0)
_MOVES = ("copy_", "_to_copy")


class OnCard(Tensor):
    """`host`, said to be on the card."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnCard:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CARD,
        )
        made.host = host
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = OnCard(self.host.clone())
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As torch.save() writes a tensor of a card that is read back onto the host."""
        return self.host.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.host.tolist()

    def __repr__(self) -> str:
        return f"OnCard({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Card(TorchDispatchMode):
    """Takes in what is made on the card, or moved to it, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    if name in ("_pin_memory", "pin_memory"):
        return args[0]
    each = name.startswith("_foreach_")
    if name not in _MOVES:
        lists = [arg if each and isinstance(arg, list) else [arg] for arg in (*args, *kwargs.values())]
        for together in zip_longest(*lists) if each else [(args, kwargs)]:
            _refuse_two_devices(func, [leaf for leaf in tree_leaves(together) if isinstance(leaf, Tensor)])
    asked = kwargs.get("device")
    to_host = dict(kwargs) if asked is None else {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map_only(OnCard, _host, args), **tree_map_only(OnCard, _host, to_host))
    if name.endswith("_") and not name.endswith("__"):
        return args[0] if out is not None else None
    if "out" in kwargs:
        return kwargs["out"]
    if each and isinstance(out, (list, tuple)):
        return [OnCard(value) if isinstance(arg, OnCard) else value for arg, value in zip(args[0], out, strict=True)]
    of_card = any(isinstance(leaf, OnCard) for leaf in tree_leaves((args, kwargs)))
    on_card = of_card if asked is None else torch.device(asked).type == "cuda"
    return tree_map_only(Tensor, OnCard, out) if on_card else out


def _host(tensor: OnCard) -> Tensor:
    return tensor.host


def _refuse_two_devices(func: Any, tensors: list[Tensor]) -> None:
    """As torch: a scalar of the host may go with the card's tensors in an operator that goes element by element."""
    host = [tensor for tensor in tensors if not isinstance(tensor, OnCard)]
    if not host or len(host) == len(tensors):
        return
    scalars = all(tensor.dim() == 0 for tensor in host) and isinstance(tensors[0], OnCard)
    if not (scalars and torch.Tag.pointwise in func.tags):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")


_make = torch.tensor


def _tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, pin_memory: bool = False) -> Tensor:
    """torch.tensor() copies to its device below the dispatcher, where no mode sees it."""
    made = _make(data, dtype=dtype)
    return made if device is None else made.to(device)


@contextmanager
def card() -> Iterator[None]:
    """Within, torch has one CUDA device, whose tensors are OnCard."""
    found = {
        "torch.tensor": _tensor,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.get_device_name": lambda device=None: "a card",
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "fasttricks.training.build.check_triton": lambda device: None,  # Triton asks the driver itself
    }
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]  # as fake tensors do: some calls select the device first
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, function in found.items():
            stack.enter_context(mock.patch(name, function))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # .data = would leave the host's values
        stack.enter_context(_Card())
        yield
