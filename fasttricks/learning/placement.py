"""The network on its device: placed, its batch norm synchronised, compiled and its gradients summed over ranks as config says."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasttricks.config import Compile, Precision, TrainConfig, require
from fasttricks.learning.compiled import CompiledModel
from fasttricks.learning.precision import halve
from fasttricks.models import synchronized
from fasttricks.system.distributed import World
from fasttricks.system.rank_order import average_in_rank_order


def place(model: nn.Module, world: World, precision: Precision) -> nn.Module:
    """`model` on the rank's device, its weights channels-last in memory and, for fp16, FP16 as precision.halve has them."""
    model.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return halve(model) if precision == "fp16" else model


def synchronize_batch_norm(model: nn.Module, world: World, compile: Compile) -> nn.Module:
    """`model` with batch norm over the images of all ranks; one rank's is that. Raises ConfigError on CPUs with `compile`, under
    which it is torch's."""
    if world.size == 1:
        return model
    rule = "needs CUDA with --compile, under which it is torch's, which takes no CPU tensors; --compile off on CPUs"
    require(world.device.type == "cuda" or compile == "off", "sync_batch_norm", True, rule)
    return synchronized(model)


def wrap(model: nn.Module, config: TrainConfig, world: World, say: Callable[[str], None]) -> nn.Module:
    """`model`, compiled where config says so, in a wrapper that sums its gradients over the ranks.

    Batch norm is local, as in the paper: no buffer is broadcast. Gradients are divided by the ranks before they are summed,
    so that FP16 does not overflow there; each dtype has buckets of its own. With three or more ranks, and unless config says
    otherwise, they are added up in the order of the ranks.
    """
    if config.compile != "off":
        model = CompiledModel(model, config.compile, fallback=config.compile_fallback, say=say)
    if world.size == 1:
        return model
    # a newer torch warns of the old name
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    local: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # with micro-batches a step is not the same graph each time: torch refuses no_sync() under static_graph
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=config.accumulate == 1, **local)
    if world.size > 2 and config.deterministic == "on":
        average_in_rank_order(wrapped, world)
    return wrapped
