"""The weights that a run starts from: trained ones, with a new classifier where the classes are others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from fasttricks.config import (
    NETWORKS,
    TIMM,
    TORCHVISION,
    DataConfig,
    ModelConfig,
    Statistics,
    nearest,
    same_statistics,
    show_classes,
    show_name,
    show_statistics,
)
from fasttricks.learning.divergence import first_not_finite
from fasttricks.models import AUXILIARY, COUNTER, base_prefix, head_names, new_names
from fasttricks.models.base import left_out
from fasttricks.runs.stored import CheckpointError
from fasttricks.runs.weights import Weights

_SHOWN = 3
_OPTIONAL = (AUXILIARY, "aux_classifier.")
"""Beginnings of the keys of auxiliary heads, which a network may go without."""


@torch.no_grad()
def start_from(
    weights: Weights, model: nn.Module, config: ModelConfig, data: DataConfig, classes: Sequence[str]
) -> str:
    """Load `weights` into `model`, which is of `config` and in FP32 on the CPU or the device. Returns the account of it, a line.

    classes: names of the outputs of `model`, in order. The classifier is loaded whole where it has as many outputs and one side
    names no classes; class by class where both name some; and else stays as it is. data: the account says where the weights
    learnt images that were normalised otherwise. All other keys and shapes must be the same. Where `model` is built on a base
    network and the weights are a classifier's, they are those of the base network, and all heads stay as they are.
    Raises CheckpointError for weights of another network, with the nearest keys, and for some that are not finite.
    """
    _check_network(weights, config)
    wanted, head = model.state_dict(), head_names(model)
    found, new = _of_base(weights.tensors, model, config)
    found = {name: tensor for name, tensor in found.items() if not name.endswith(COUNTER) or name in wanted}
    _check_keys(weights, wanted, found, head, new)
    if bad := first_not_finite(dict(found)):
        raise CheckpointError(f"init = {weights.source!r}: {bad} must be finite; use another one")
    body = {name: tensor for name, tensor in found.items() if name in wanted and name not in head}
    before = getattr(model, "background", 0)
    rows, account = _head(weights, wanted, found, head, classes, before=before, of_base=bool(new))
    model.load_state_dict({**wanted, **body, **rows})
    return f"{weights.source}: {len(body)} tensors; {account}{_otherwise(weights.statistics, (data.mean, data.std))}"


def _of_base(
    tensors: Mapping[str, Tensor], model: nn.Module, config: ModelConfig
) -> tuple[Mapping[str, Tensor], Sequence[str]]:
    """(`tensors` with the names that they have in `model`, the names that are new there): a classifier's for a base network,
    without the parts of it that are left out there. Any others as they are, with none."""
    prefix = base_prefix(model)
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return tensors, ()
    unused = left_out(model, config)
    found = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in found.items() if name not in unused}, new_names(model)


def _otherwise(theirs: Statistics | None, ours: Statistics) -> str:
    if theirs is None or same_statistics(theirs, ours):
        return ""
    return f"; its images were normalised otherwise than this run's: {show_statistics(theirs)} is the same"


def _check_network(weights: Weights, config: ModelConfig) -> None:
    """Raise CheckpointError for weights that are known to be of a network that computes otherwise: A and B have the same keys."""
    theirs = weights.network
    if theirs in ("", config.name):
        return
    if theirs.startswith(TIMM):
        bare = theirs.removeprefix(TIMM).partition(".")[0]  # resnet50.a1_in1k
        right = [name for name, info in NETWORKS.items() if info.timm == bare] or [theirs]
    elif theirs.startswith(TORCHVISION):
        right = [name for name, info in NETWORKS.items() if info.torchvision == theirs.removeprefix(TORCHVISION)]
    else:
        right = [theirs]
    if config.name not in right:
        rule = f"has the weights of {show_name(theirs)}, and model.name is {config.name}"
        way_out = f"give --model.name {show_name(right[-1])}, or other weights" if right else "give other weights"
        raise CheckpointError(f"init = {weights.source!r}: {rule}; {way_out}")


def _check_keys(
    weights: Weights,
    wanted: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    head: Collection[str],
    heads: Collection[str],
) -> None:
    """Raise CheckpointError where a key or shape differs outside of the classifiers and of the new `heads`."""
    strangers = [name for name in found if name not in wanted and not name.startswith(_OPTIONAL)]
    new = (*head, *heads, *(name for name in wanted if name.startswith(_OPTIONAL)))
    missing = [name for name in wanted if name not in (*found, *new) and not name.endswith(COUNTER)]
    pairs = {n: (tuple(found[n].shape), tuple(wanted[n].shape)) for n in found if n in wanted}
    shapes = [
        f"{name} {theirs} for {ours}"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours and (name not in head or theirs[1:] != ours[1:])
    ]
    missing_words = [f"{name} (nearest there: {nearest(name, strangers) or 'none'})" for name in missing[:_SHOWN]]
    kinds = (
        ("missing", len(missing), missing_words),
        ("unknown", len(strangers), strangers[:_SHOWN]),
        ("of another shape", len(shapes), shapes[:_SHOWN]),
    )
    told = [f"{count} {kind}: {', '.join(map(show_name, first))}" for kind, count, first in kinds if count]
    if told:
        rule = "must have the keys and shapes of this network (model.name, width), but for its classifier"
        raise CheckpointError(f"init = {weights.source!r}: {rule}; found {'; '.join(told)}")


def _head(
    weights: Weights,
    wanted: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    head: Sequence[str],
    classes: Sequence[str],
    *,
    before: int,
    of_base: bool,
) -> tuple[dict[str, Tensor], str]:
    """(the tensors of the classifiers, which need not be all, the account of them).

    before: outputs before the first class. of_base: the weights are a base network's.
    """
    theirs, count = weights.classes, len(classes)
    new = show_classes(count)
    if of_base:
        return {}, f"a new head of {new} on it"
    there = [name for name in head if name in found]
    if not there:
        return {}, f"a new classifier of {new}: there is none"
    number = {name: label for label, name in enumerate(theirs or ())}
    rows = [(label, number[name]) for label, name in enumerate(classes) if name in number]
    if theirs is None:
        if any(found[name].shape != wanted[name].shape for name in there):
            return {}, f"a new classifier of {new}: there it has {len(found[there[0]]) - before}"
        return {name: found[name] for name in there}, "its classifier too"
    if any(len(found[name]) * (before + count) != len(wanted[name]) * (before + len(theirs)) for name in there):
        rule = f"names {len(theirs)} classes, and its classifier has {len(found[there[0]]) - before}; use another one"
        raise CheckpointError(f"init = {weights.source!r}: {rule}")
    if not rows:
        return {}, f"a new classifier of {new}: none of them is among its {len(theirs)}"
    rows = [*((label, label) for label in range(before)), *((ours + before, old + before) for ours, old in rows)]
    ours, source = (torch.tensor(numbers) for numbers in zip(*rows, strict=True))
    tensors = {}
    for name in there:
        each = len(wanted[name]) // (before + count)  # a detector has four numbers of a box for each class
        tensors[name] = wanted[name].clone()
        by_class = tensors[name].view(before + count, each, *wanted[name].shape[1:])
        by_class[ours.to(wanted[name].device)] = found[name].view(-1, *by_class.shape[1:])[source].to(wanted[name])
    known = len(rows) - before
    others = f", {count - known} new" if known < count else ""
    return tensors, f"its classifier by class name: {known} of {new}{others}"
