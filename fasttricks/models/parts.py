"""The parts of a network by name: its stem, or any of its modules."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasttricks.config import require, unknown
from fasttricks.models.head import base_prefix

STEM = "stem"
"""The part before the first stage."""
NORMS = "batch_norm"
"""All batch norm of a network, or of the base network that it is built on."""
FIRST_STAGES = ("layer1", "blocks", "Mixed_5b")
"""Names of the first stage: of ResNets, MobileNets and Inceptions, here, in torchvision and in timm."""


class Part(NamedTuple):
    """A part of a network."""

    modules: tuple[nn.Module, ...]
    """Its modules, without those within them."""
    parameters: tuple[nn.Parameter, ...]
    """All of theirs, and those that the network itself holds, as a class token."""


def find_part(model: nn.Module, name: str) -> Part:
    """The part `name` of `model`: a module by its path, as layer1 or blocks.0; stem, all before the first stage; or
    batch_norm, all of it.

    stem is the module of that name; where there is none, the group stem of a network with timm's group_matcher(), or the
    modules before the one with a name of FIRST_STAGES. Parts of a base network have their names there, without backbone.
    Raises ConfigError for an unknown name, with the nearest right one, and for a part without weights.
    """
    base = model.get_submodule(base_prefix(model).rstrip("."))
    modules = {**dict(base.named_modules()), **dict(model.named_modules())}
    del modules[""]
    part = Part((modules[name],), tuple(modules[name].parameters())) if name in modules else None
    if part is None and name == STEM:
        part = _stem(base)
    if part is None and name == NORMS:
        norms = [module for module in base.modules() if isinstance(module, _BatchNorm)]
        part = Part(tuple(norms), tuple(parameter for norm in norms for parameter in norm.parameters()))
    tops = [top for top, module in (*base.named_children(), *model.named_children()) if list(module.parameters())]
    tops = list(dict.fromkeys(tops))
    has = f"the network has {', '.join(tops)}, and modules within them such as {_inner(modules)}"
    rule = "is no part that is known of this network" if name == STEM else unknown(name, [STEM, NORMS, *tops])
    require(part is not None, "model.freeze", name, f"{rule}; {has}")
    assert part is not None
    require(bool(part.parameters), "model.freeze", name, f"has no weights; {has}")
    return part


def _inner(modules: dict[str, nn.Module]) -> str:
    return next((name for name in modules if "." in name), "none")


def _stem(model: nn.Module) -> Part | None:
    """The network's stem, by timm's table of groups or by the name of the first stage; None where it has neither."""
    matcher: Any = getattr(model, "group_matcher", None)
    groups = matcher(coarse=True) if callable(matcher) else None
    if isinstance(groups, dict) and STEM in groups:
        rule = groups[STEM]  # a regular expression, or pairs of one and a number
        patterns = [rule] if isinstance(rule, str) else [pair[0] for pair in rule]
        matched = {name: p for name, p in model.named_parameters() if any(re.match(one, name) for one in patterns)}
        owners = dict.fromkeys(name.rpartition(".")[0] for name in matched)
        return Part(tuple(model.get_submodule(name) for name in owners if name), tuple(matched.values()))
    children = list(model._modules)
    if not (stages := [name for name in children if name in FIRST_STAGES]):
        return None
    found = tuple(model.get_submodule(name) for name in children[: children.index(stages[0])])
    return Part(found, tuple(parameter for module in found for parameter in module.parameters()))
