"""Precisions of a run: FP32, BF16 autocast, and the paper's FP16 with FP32 master weights and a loss scale (section 3.2).

fp16 here: weights of convolutions and linear layers, activations and their gradients in FP16; batch-norm parameters and
statistics in FP32 (cuDNN's FP16 batch norm takes no others; the one departure from the paper); loss, master weights and
momentum in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fasttricks.config import ConfigError, OptimConfig, Precision, require
from fasttricks.learning.divergence import bad_gradients
from fasttricks_kernels import MasterSGD

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context of a forward pass."""
FIRST_SCALE = 2.0**16
"""Where a dynamic loss scale starts. Too high costs a skipped step each halving; too low costs small gradients."""


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`precision` resolved for `device`: auto is fp16 on CUDA and fp32 on the CPU, where FP16 is several times slower."""
    if precision != "auto":
        return precision
    return "fp16" if device.type == "cuda" else "fp32"


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raise ConfigError for bf16 on a card that has none in hardware (before Ampere)."""
    if precision == "bf16" and device.type == "cuda":
        rule = "needs a card with bfloat16 in hardware (Ampere or newer); take --precision fp16"
        require(torch.cuda.is_bf16_supported(including_emulation=False), "precision", precision, rule)


def make_autocast(precision: Precision, device: torch.device) -> Autocast:
    """The context of the forward pass: autocast to bfloat16 for bf16, else none."""
    enabled = resolve_precision(precision, device) == "bf16"
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=enabled)


def image_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype that a network of this precision takes its images in."""
    return torch.float16 if resolve_precision(precision, device) == "fp16" else torch.float32


def halve(model: nn.Module) -> nn.Module:
    """Convolutions and linear layers of `model` to FP16, in place, all else left in FP32. Returns `model`.

    A network may have parts `in_fp32`, modules that stay as they are.

    Split by the module's type, as the parameter groups are. Rounds to nearest; a weight above 65504 becomes infinite.
    Raises ConfigError for a network with parameters of any other kind than these and batch norm's, such as layer norm's:
    they would meet FP16 activations in FP32, which torch refuses.
    """
    kept = {module for part in getattr(model, "in_fp32", ()) for module in part.modules()}
    for name, module in model.named_modules():
        if module in kept:
            continue
        if isinstance(module, (_ConvNd, nn.Linear)):
            module.half()
        elif not isinstance(module, _BatchNorm) and list(module.parameters(recurse=False)):
            kind = f"{name or 'the network'} is a {type(module).__name__}"
            rule = f"knows convolutions, linear layers and batch norm only, but {kind}"
            raise ConfigError(f"precision = 'fp16': {rule}; take --precision bf16 or fp32")
    return model


class LossScale:
    """The factor on the loss that lifts FP16 gradients above FP16's smallest numbers. 1 in the other precisions.

    Dynamic: times 1/2 by a step whose gradients overflowed (which is skipped), times 2 after `growth_steps` steps in
    a row without. Static: as given. Powers of two change no bit of a gradient that is in range. Everything is on the
    device: no sync. Source: section 3.2, and Micikevicius et al. 2018 (arXiv:1710.03740), section 3.2.
    """

    def __init__(self, value: float, device: torch.device, *, on: bool = True, growth_steps: int = 0) -> None:
        """value: above 0. on: look for overflow. growth_steps: 0 makes it static."""
        self.on = on
        self.value = torch.tensor(value, dtype=torch.float32, device=device)
        """() float32: the factor of the next step."""
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """() int64: steps skipped so far."""
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._growth_steps = growth_steps

    def step(self, optimizer: torch.optim.Optimizer, *, check: bool = False) -> None:
        """optimizer.step() with the scale taken out again; where gradients overflowed, skipped on the device.

        check: skip it for gradients that are not finite in the other precisions too, at the cost of reading them once more.
        """
        if isinstance(optimizer, MasterSGD) and (self.on or check):
            optimizer.step(loss_scale=self.value)
            assert optimizer.overflow is not None
            if self.on:
                self.update(optimizer.overflow)
            return
        if check:
            _begin_momentum(optimizer)
            optimizer.found_inf = bad_gradients(optimizer)  # type: ignore[attr-defined]  # torch's fused SGD reads it
        optimizer.step()

    @torch.no_grad()
    def update(self, overflow: Tensor) -> None:
        """Take in whether the step's gradients overflowed: a () float32 tensor, 1 or 0, on the device."""
        self.skipped += overflow.to(torch.int64)
        if not self._growth_steps:
            return
        self._good_steps.add_(1).mul_(1 - overflow.to(torch.int64))
        grow = self._good_steps == self._growth_steps
        self._good_steps.masked_fill_(grow, 0)
        factor = torch.where(overflow > 0, 0.5, torch.where(grow, 2.0, 1.0))
        # at the ends of FP32's range it stays: a scale of 0 or infinity would never come back
        self.value.mul_(factor).clamp_(min=2.0**-126, max=2.0**126)

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a checkpoint keeps."""
        return {"value": self.value, "skipped": self.skipped, "good_steps": self._good_steps}

    def report(self) -> dict[str, float]:
        """For the log: loss_scale and skipped_steps; empty where there is no loss scale. A sync."""
        return {"loss_scale": self.value.item(), "skipped_steps": self.skipped.item()} if self.on else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state that state_dict() gave. A static scale keeps the value that it was made with."""
        self.skipped.copy_(state["skipped"])
        if self._growth_steps:
            self.value.copy_(state["value"])
            self._good_steps.copy_(state["good_steps"])


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum of 0, which the first step turns into the gradient: torch's own first step, if skipped, would leave noise."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def make_loss_scale(config: OptimConfig, precision: Precision, device: torch.device) -> LossScale:
    """The loss scale of a run: as config says for fp16, else 1."""
    if resolve_precision(precision, device) != "fp16":
        return LossScale(1.0, device, on=False)
    if config.loss_scale:
        return LossScale(config.loss_scale, device)
    return LossScale(FIRST_SCALE, device, growth_steps=config.loss_scale_steps)
