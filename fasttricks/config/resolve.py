"""From a recipe and its overrides to the config that is trained: tricks first, then single fields, then the run's folder.

The command line and Python callers go through the same `resolve`; build() takes nothing that did not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from fasttricks.config.errors import ConfigError, require, unknown
from fasttricks.config.fields import field_kinds, from_plain, replace_fields
from fasttricks.config.schema import TrainConfig, TricksConfig
from fasttricks.config.tricks import apply_tricks, find_trick, is_off, is_on

C = TypeVar("C", bound=TrainConfig)
NOTHING: Mapping[str, Any] = MappingProxyType({})
_WAY_OUT = "call fasttricks.config.resolve.resolve(config), and build its result"


def resolve(recipe: C, overrides: Mapping[str, Any] = NOTHING) -> C:
    """`recipe` with its tricks switched, then with the single fields of `overrides`, and with a folder for the run.

    overrides: dotted field paths to values, {"loss.smoothing": 0.1, "tricks.on": ("mixup",)}. A trick that they name is
    switched as they say, whatever the recipe's lists say of it. A trick that is on keeps the recipe's value. A single field
    wins over a trick, which then leaves its list, so the lists agree with the fields. An empty run_dir becomes runs/RECIPE.
    Resolving a resolved config changes nothing.
    Raises ConfigError for an unknown field or trick, with the nearest right name, for a value of another kind than its
    field's, and as the config itself does for a value that breaks a rule.
    """
    fields = check_kinds(type(recipe), overrides)
    on, off = fields.pop("tricks.on", recipe.tricks.on), fields.pop("tricks.off", recipe.tricks.off)
    if "tricks.off" not in overrides:
        off = tuple(name for name in off if name not in on)
    elif "tricks.on" not in overrides:
        on = tuple(name for name in on if name not in off)
    TricksConfig(on=on, off=off)  # no trick is on and off at once
    resolved = replace_fields(apply_tricks(recipe, on=on, off=off), fields)
    tricks = TricksConfig(
        on=tuple(name for name in on if is_on(resolved, name)),
        off=tuple(name for name in off if is_off(resolved, name)),
    )
    return dataclasses.replace(resolved, tricks=tricks, run_dir=resolved.run_dir or f"runs/{resolved.recipe}")


def check_kinds(cls: type, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` as the fields of `cls` hold them. Raises ConfigError for a path that is none, and for a wrong kind."""
    kinds = field_kinds(cls)
    for path in overrides:
        inside = [name for name in kinds if name.startswith(f"{path}.")]
        if inside:
            raise ConfigError(f"field = {path!r}: is a section; name its fields one by one, as {inside[0]!r}")
        if path not in kinds:
            raise ConfigError(f"field = {path!r}: {unknown(path, kinds)}; the fields have the names of --help")
    return {path: from_plain(kinds[path], value, path) for path, value in overrides.items()}


def require_resolved(config: TrainConfig) -> None:
    """Raise ConfigError where `config` lists a trick that its fields lack, or has no run_dir."""
    require(bool(config.run_dir), "run_dir", config.run_dir, f"must name a folder; {_WAY_OUT}: runs/RECIPE")
    require_switched(config)


def require_switched(config: TrainConfig) -> None:
    """Raise ConfigError where a trick that `config` lists as on or off is not so in its fields."""
    for listed, name in _not_as_listed(config):
        fields = ", ".join(find_trick(name).on)
        rule = f"disagrees with the fields: {fields} would differ; {_WAY_OUT}, or remove it from the list"
        raise ConfigError(f"tricks.{listed} = {name!r}: {rule}")


def _not_as_listed(config: TrainConfig) -> Iterator[tuple[str, str]]:
    yield from (("on", name) for name in config.tricks.on if not is_on(config, name))
    yield from (("off", name) for name in config.tricks.off if not is_off(config, name))
