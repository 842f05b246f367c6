"""A loss that is NaN or has exploded: noted on the device in the step, read at the log interval and before every save."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttricks.config import UserError
from fasttricks.system.distributed import World

MOST_SKIPPED = 100
"""Bad micro-batches of a rank in a row, with nothing else between, after which skipping is no way out."""


Counted = tuple[Tensor, int | Tensor]
"""A micro-batch's share of the log: its loss or losses, as Task.loss gives them, without a graph; and its images."""


class DivergedError(UserError):
    """The training loss, or a weight, is no longer a usable number."""


class BadLoss(NamedTuple):
    """The first bad micro-batch since the last look, and how many there were, over all ranks."""

    step: int
    """Updates done before it."""
    loss: float
    """Its mean over its images, nats."""
    micro_batches: int
    hopeless: bool
    """The last MOST_SKIPPED were all bad."""


class LossGuard:
    """Watches the mean loss of each micro-batch. Never waits for the device but in look().

    limit: highest mean loss of a micro-batch, nats; 0: any finite one. skip: let a step with a bad micro-batch change
    nothing, instead of ending the run. Its loss is then turned to NaN, so that after the sum over ranks every rank's
    gradients are, and every optimizer leaves this step out: no rank has to be asked.
    """

    def __init__(self, world: World, *, limit: float, skip: bool) -> None:
        self.skip, self._world, self._limit = skip, world, limit or sys.float_info.max
        self.skipped = 0
        """Bad micro-batches left out so far, over all ranks, as of the last look."""
        self.judged = 0
        """Micro-batches since the last look. train_step counts them: a step that is replayed calls nothing here."""
        self._in_a_row = 0
        self._count = torch.zeros((), dtype=torch.int64, device=world.device)
        self._step = torch.zeros((), dtype=torch.int64, device=world.device)
        self._loss = torch.zeros((), dtype=torch.float32, device=world.device)

    def judge(self, loss_sum: Tensor, num_images: int, step: int | Tensor) -> tuple[Tensor, Counted]:
        """The loss for the backward pass, a scalar, and the log's (loss, images). loss_sum: as Task.loss, over so many images."""
        parts, loss_sum = loss_sum.detach(), loss_sum.sum()
        with torch.no_grad():
            good = (loss_sum <= self._limit * num_images) & loss_sum.isfinite()
            keep = good | (self._count > 0)
            # in place: a step that is replayed finds them where they were
            self._loss.copy_(torch.where(keep, self._loss, loss_sum / max(num_images, 1)))
            self._step.copy_(torch.where(keep, self._step, step))
            self._count += ~good
        if not self.skip:
            return loss_sum, (parts, num_images)
        counted = torch.where(good, parts, 0.0), torch.where(good, num_images, 0)
        return loss_sum * torch.where(good, 1.0, math.nan), counted

    def look(self) -> BadLoss | None:
        """The first bad loss since the last look, on any rank, or None. A collective and a sync."""
        count = int(self._world.sum_(self._count.clone()).item())
        judged, self.judged = self.judged, 0
        self._in_a_row = self._in_a_row + judged if count == judged * self._world.size else 0
        if not count:
            return None
        mine = [self._step.item(), self._loss.item()] if self._count.item() else None
        found = [first for first in map(json.loads, self._world.gather(json.dumps(mine).encode())) if first]
        step, loss = min(found, key=lambda first: first[0])
        bad = BadLoss(step, loss, count, self._in_a_row >= MOST_SKIPPED)
        self._count.zero_()
        self.skipped += count if self.skip else 0
        return bad

    def state_dict(self) -> dict[str, int]:
        """The state that a checkpoint keeps, without the notes since the last look."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the state that state_dict() gave."""
        self.skipped = state["skipped"]


@torch.no_grad()
def bad_gradients(optimizer: torch.optim.Optimizer) -> Tensor:
    """() float32, on the device: 1 where a gradient is not finite, else 0. Reads every gradient once; no sync."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return (~_largest(grads).isfinite()).float()


def first_not_finite(state: object) -> str | None:
    """The name of a tensor in `state`, a nest of dicts and lists, with a NaN or infinity, or None. Reads all.

    Its tensors may be on several devices: in a run's state, its own on the card and other ranks' on the host. A sync for each.
    """
    named = [(name, tensor) for name, tensor in _tensors(state) if tensor.is_floating_point() and tensor.numel()]
    on: dict[torch.device, list[Tensor]] = {}
    for _, tensor in named:
        on.setdefault(tensor.device, []).append(tensor)
    if all(bool(_largest(tensors).isfinite()) for tensors in on.values()):
        return None
    return next(name for name, tensor in named if not bool(tensor.isfinite().all()))


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest absolute value of all, which are on one device; NaN where there is one."""
    norms = torch._foreach_norm(tensors, math.inf)
    return torch.stack([norm.float() for norm in norms]).max()


def _tensors(state: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield prefix, state
    items: Any = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for name, value in items:
        yield from _tensors(value, f"{prefix}.{name}" if prefix else str(name))
