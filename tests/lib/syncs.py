"""Modes that fail where the host would wait for the device; on the CPU too, where nothing waits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostSync(TorchDispatchMode):
    """Fails on what makes the host wait: reading a value, a shape that depends on values, a copy between devices."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{func} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = [index for index in indices if index is not None and index.dtype == torch.bool]
        assert not masks, f"{func} by a mask waits for the device: its shape depends on the values"
        devices = {value.device for value in args if isinstance(value, Tensor) and value.dim()}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        assert len(devices) <= 1 or name not in ("_to_copy", "copy_"), f"{func} copies between devices"
        return func(*args, **kwargs)


class NoHostCopy(TorchFunctionMode):
    """Fails on calls that copy to the host: on the CPU they copy nothing, so that the dispatcher does not see them.

    numpy() is not among them: it is an error on a GPU's tensor, so code that both devices run takes it after cpu() or not at all.
    """

    COPYING = (
        "cpu",
        "tolist",
        "item",
        "__bool__",
        "__float__",
        "__int__",
        "__array__",
        "__repr__",
        "__format__",
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in self.COPYING, f"Tensor.{name} waits for the device"
        to_cpu = name == "to" and any(str(value) == "cpu" for value in (*args[1:], *(kwargs or {}).values()))
        assert not to_cpu, "Tensor.to('cpu') waits for the device"
        return func(*args, **(kwargs or {}))
