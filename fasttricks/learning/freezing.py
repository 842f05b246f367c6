"""Frozen parts of a network: they keep their weights and batch-norm statistics while the others are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fasttricks.config import require
from fasttricks.models import find_part


def freeze(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Freeze the parts `names` of `model`, as models.find_part knows them. Returns `model`.

    Their parameters need no gradient, so they are in no group of the optimizer, and no backward pass runs into those that come
    first. Their modules stay in evaluation mode, also when train() is called on the network: batch norm normalises by its
    statistics and keeps them, and dropout is off. Raises ConfigError as find_part, and where nothing is left to train. Call it
    after the network was placed: synchronised batch norm consists of other modules.
    """
    for part in [find_part(model, name) for name in names]:
        for parameter in part.parameters:
            parameter.requires_grad_(False)
        for module in part.modules:
            module.eval()
            module.train = partial(_stay, module)  # type: ignore[method-assign]
    left = any(parameter.requires_grad for parameter in model.parameters())
    require(
        left or not names,
        "model.freeze",
        " ".join(names),
        "leaves no weight to train; leave the classifier out at least",
    )
    return model


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of module.train(): nn.Module.train() of the network calls it, and stops here."""
    return module


@torch.no_grad()
def frozen_weights(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the weights of these parts by name, and of any that need no gradient already, in their dtype, on the CPU.

    Raises ConfigError as find_part.
    """
    frozen = {parameter for name in names for parameter in find_part(model, name).parameters}
    named = model.named_parameters(remove_duplicate=False)
    return {n: p.to("cpu", copy=True) for n, p in named if p in frozen or not p.requires_grad}


def moving_buffers(model: nn.Module) -> Iterator[str]:
    """The names of the buffers that training changes: of the modules in training mode, which frozen ones never are."""
    for prefix, module in model.named_modules():
        if module.training:
            yield from (f"{prefix}.{name}" if prefix else name for name, _ in module.named_buffers(recurse=False))
