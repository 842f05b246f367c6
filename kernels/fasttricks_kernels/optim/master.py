"""MasterSGD: torch.optim.SGD with FP32 masters of 16-bit weights, one launch a group, skipped on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .. import _checks, reference
from ._memory import is_dense
from .sgd import checked_numbers, overflow, sgd_step

BUFFERS = ("master", "momentum_buffer")
"""A parameter's state, in the wide dtype: torch.optim.SGD's name, and ours."""
OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ABSENT: dict[str, Any] = {
    "nesterov": False,
    "dampening": 0.0,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}
"""Options that a group saved by an earlier version lacks. The last three are torch.optim.SGD's alone, which needs them."""


class MasterSGD(torch.optim.Optimizer):
    """torch.optim.SGD for models in FP16 or BF16: FP32 masters in its state, one launch a group, skips on overflow.

    The same update as torch.optim.SGD on the masters; float32 and float64 parameters are their own masters. Where
    a loss scale is given, gradients are divided by it, and the whole step is skipped, on the device, if one of them
    is not finite; `overflow` then holds 1 (a () float32 tensor, to adapt the scale by without a sync).

    Works with torch.amp.GradScaler too: scaler.step(optimizer) hands over its scale and its overflow check.

    Args:
        params: parameters or groups, as for any torch.optim.Optimizer: float16, bfloat16, float32 or float64. Masters are
            made at the first step. A parameter that is not dense in memory is copied in each step, there and back.
            Gradients of other strides, or sparse, are copied too.
        lr: learning rate, a step: as sgd_step() takes it.
        momentum, weight_decay: finite, at least 0. With momentum 0 there is no buffer.
        dampening: finite. As torch has it, the first step of a parameter is not dampened. Not with a loss scale: whether it
            skipped that step, only the device knows.
        nesterov: g + momentum v instead of v; needs momentum above 0 and dampening 0.
        maximize: ascend.
        foreach, differentiable, fused: torch's, for a call written for it. Left out, or foreach=False, differentiable=False
            and fused=True, which is so here.

    `state_dict()` loads into torch.optim.SGD, and its loads here; `master` is then a key that torch keeps and does not use.
    After a load the weights count: at the next step, a master that does not round to its weight is made from the weight.

    Raises: TypeError, ValueError: a wrong dtype, range or combination, at once; a state that does not fit, before anything
    is changed.
    """

    _step_supports_amp_scaling = True  # GradScaler: "I unscale and skip myself"
    overflow: Tensor | None
    """() float32, on the device: 1 where the last step was skipped; None after a step without a check."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: Tensor | float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        values = lr, momentum, dampening, weight_decay, nesterov, maximize
        hints = {"foreach": foreach, "differentiable": differentiable, "fused": fused}
        defaults = {**dict(zip(OPTIONS, values, strict=True)), **hints}
        _check_options(defaults)
        self.overflow = None
        self._loaded = False  # the masters are yet to be compared with the weights
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's. Raises TypeError and ValueError, and then adds nothing."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for position, param in enumerate(group["params"]):
                if param.dtype not in _checks.FLOATS or param.layout != torch.strided:
                    kind = f"{param.dtype}, {param.layout}"
                    rule = "must be dense float16, bfloat16, float32 or float64"
                    raise TypeError(f"parameter {position} {rule}, but is {kind}; leave it to torch.optim.SGD")
                if isinstance(group["lr"], Tensor) and not group["lr"].is_cpu:
                    _checks.check_device("lr", group["lr"], f"parameter {position}", param)
        except Exception:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss_scale: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient.

        loss_scale: () float32 tensor on the parameters' device. Raises TypeError for a number, before the closure is called.
        """
        if loss_scale is not None:
            _checks.check_tensor("loss_scale", loss_scale)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._loaded:
            self._follow_weights()
        grad_scale = loss_scale if loss_scale is not None else getattr(self, "grad_scale", None)
        work = [(group, _alike(group["params"])) for group in self.param_groups]
        if loss_scale is None:
            self.overflow = getattr(self, "found_inf", None)
        else:
            self.overflow = _find_overflow([grads for _, alike in work for _, grads in alike])
        for group, alike in work:
            if group["dampening"] != 0 and (grad_scale is not None or self.overflow is not None):
                rule = (
                    "does not go with a loss scale: whether a parameter's first step was skipped, only the device knows"
                )
                raise ValueError(f"dampening = {group['dampening']} {rule}; pass dampening=0")
            for params, grads in alike:
                if group["dampening"] == 0:
                    self._step_alike(params, grads, group, grad_scale)
                    continue
                begun = [self._has(p, "momentum_buffer") for p in params]
                first = [not has for has in begun]
                for chosen, options in ((begun, group), (first, {**group, "dampening": 0.0})):
                    if any(chosen):
                        self._step_alike([*compress(params, chosen)], [*compress(grads, chosen)], options, grad_scale)
        return loss

    def _step_alike(
        self, params: list[Tensor], grads: list[Tensor], options: dict[str, Any], grad_scale: Tensor | None
    ) -> None:
        """The step of parameters of one dtype and device."""
        device = params[0].device
        is_wide = params[0].dtype == reference.wide_dtype(params[0].dtype)
        weights = [p if is_dense(p) else p.detach().contiguous() for p in params]
        sgd_step(
            weights,
            grads,
            [] if is_wide else [self.master_of(p) for p in params],
            [self._momentum_of(p) for p in params] if options["momentum"] != 0 else [],
            grad_scale=_on(device, grad_scale),
            found_inf=_on(device, self.overflow),
            **{name: options[name] for name in OPTIONS},
        )
        for param, weight in zip(params, weights, strict=True):
            if weight is not param:
                param.copy_(weight)

    def master_of(self, param: Tensor) -> Tensor:
        """The tensor that step() updates `param` from: its FP32 master, made now if need be, or `param` if it is FP32 or FP64."""
        wide = reference.wide_dtype(param.dtype)
        if param.dtype == wide:
            return param
        state = self.state[param]
        if "master" not in state:
            state["master"] = param.detach().to(wide, memory_format=torch.preserve_format)
        return state["master"]

    def _momentum_of(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            wide = reference.wide_dtype(param.dtype)
            state["momentum_buffer"] = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
        return state["momentum_buffer"]

    def _has(self, param: Tensor, name: str) -> bool:
        return param in self.state and name in self.state[param]

    # ------------------------------------------------------------------------------------------------------- state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, hooks too, but FP32 stays FP32: torch's own casts state to the parameter's FP16.

        Takes a state_dict() of torch.optim.SGD, of FP16 weights or of FP32: state that is missing is made at the next step.
        Raises TypeError and ValueError for options or shapes that do not fit, and then changes nothing.
        """
        exact: list[tuple[Tensor, dict[str, Tensor]]] = []
        # After the caller's own hooks, whose result is loaded; and before those that see the loaded state.
        before = self.register_load_state_dict_pre_hook(lambda _, given: exact.extend(self._exact(given)))
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(exact), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _exact(self, given: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each parameter with its buffers of `given`, checked, in the wide dtype and in its memory order."""
        for group, saved in zip(self.param_groups, given["param_groups"], strict=False):  # torch names unequal lengths
            _check_options({**ABSENT, **group, **saved, "foreach": None, "fused": None})
            for key, param in zip(saved["params"], group["params"], strict=False):
                found = {}
                for name in BUFFERS:
                    value = given["state"].get(key, {}).get(name)
                    if value is None or (name == "master" and param.dtype == reference.wide_dtype(param.dtype)):
                        continue
                    _checks.check_tensor(f"{name} of parameter {key}", value)
                    if value.shape != param.shape:
                        shapes = f"has shape {tuple(value.shape)}, but the parameter has {tuple(param.shape)}"
                        raise ValueError(f"{name} of parameter {key} {shapes}; this state is of another model")
                    wide = reference.wide_dtype(param.dtype)
                    found[name] = torch.empty_like(param, dtype=wide, memory_format=torch.preserve_format).copy_(value)
                yield param, found

    def _restore(self, exact: list[tuple[Tensor, dict[str, Tensor]]]) -> None:
        for param, found in exact:
            state = self.state[param]
            for name in BUFFERS:
                state.pop(name, None)
            state.update(found)
            if not state:
                del self.state[param]
        self._loaded = True

    def _follow_weights(self) -> None:
        """A master that does not round to its weight is made from it: the weight was trained or loaded without it."""
        self._loaded = False
        for param in (p for group in self.param_groups for p in group["params"] if self._has(p, "master")):
            master = self.state[param]["master"]
            master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(master.dtype)))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "overflow": self.overflow, "_loaded": self._loaded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in ABSENT.items():
                group.setdefault(name, value)
        self.__dict__.setdefault("overflow", None)
        self.__dict__.setdefault("_loaded", False)


def _check_options(options: dict[str, Any]) -> None:
    checked_numbers(*(options[name] for name in OPTIONS[:-1]))
    if options["differentiable"]:
        raise ValueError("differentiable=True is not supported: the step is outside autograd; take torch.optim.SGD")
    if options["foreach"]:
        raise ValueError("foreach=True has no effect: all parameters are updated in one launch; leave it out")
    if options["fused"] is False:
        raise ValueError("fused=False has no effect: all parameters are updated in one launch; leave it out")


def _on(device: torch.device, scalar: Any) -> Any:
    """The scalar there; other devices get a copy. sgd_step() names a scalar that is no tensor."""
    if not isinstance(scalar, Tensor) or scalar.device == device:
        return scalar
    return scalar.to(device, non_blocking=True)


def _alike(params: Iterable[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Those that have a gradient, with their gradients, by dtype and device.

    A parameter that comes again is in a list of its own, as the programs of a launch run at once.
    """
    groups: dict[tuple[torch.dtype, torch.device, int], tuple[list[Tensor], list[Tensor]]] = {}
    times: dict[int, int] = {}
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        time = times[id(param)] = times.get(id(param), -1) + 1
        alike = groups.setdefault((param.dtype, param.device, time), ([], []))
        alike[0].append(param)
        alike[1].append(grad)
    return list(groups.values())


def _find_overflow(lists: list[list[Tensor]]) -> Tensor | None:
    """One check over the gradients of every group: a step is skipped as a whole or not at all."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for grads in lists:
        alike.setdefault((grads[0].dtype, grads[0].device), []).extend(grads)
    found = None
    for grads in alike.values():
        here = overflow(grads)
        found = here if found is None else torch.maximum(found, _on(found.device, here))
    return found
