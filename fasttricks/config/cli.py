"""Command lines from dataclasses: a recipe plus single fields, a wrong name answered with the nearest right one.

The only importer of tyro.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from fasttricks.config.expected import EXPECTED
from fasttricks.config.fields import field_docs, field_kinds, get_at
from fasttricks.config.ranges import OneOf, field_rules
from fasttricks.config.recipes import RECIPES, find_recipe, summary
from fasttricks.config.resolve import C, resolve
from fasttricks.config.schema import TrainConfig, TricksConfig
from fasttricks.config.tricks import TRICKS, is_off, is_on

T = TypeVar("T")
_RANK = int(os.environ.get("RANK", 0))


def parse(config: T, args: Sequence[str], *, prog: str, description: str) -> T:
    """`config` with the fields that `args` name replaced.

    Exits 2 at a wrong field, with the nearest right one, or a wrong value, with the rule; 0 after --help.
    """
    return tyro.cli(
        type(config),
        default=config,
        args=list(args),
        prog=prog,
        description=description,
        console_outputs=_RANK == 0,
        registry=_WITH_RANGES,
    )


_WITH_RANGES = ConstructorRegistry()
"""Adds the rule of a field's value to its help, after the string under the field."""


@_WITH_RANGES.struct_rule
def _fields_with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
    """As tyro makes a dataclass from a default, with other help. None for any other type."""
    cls, default = info.type, info.default
    if not (dataclasses.is_dataclass(cls) and isinstance(default, cls)):
        return None
    kinds, docs, rules = get_type_hints(cls), field_docs(cls), field_rules(cls)
    words = {name: f" Must be {rule.words}." for name, rule in rules.items() if not isinstance(rule, OneOf)}
    fields = [
        StructFieldSpec(name, kinds[name], getattr(default, name), helptext=docs.get(name, "") + words.get(name, ""))
        for name in (one.name for one in dataclasses.fields(cls))
    ]
    return StructConstructorSpec(instantiate=cls, fields=tuple(fields))


def parse_recipe(args: Sequence[str], *, prog: str) -> TrainConfig:
    """A resolved TrainConfig from `RECIPE [--section.field value ...]`: the recipe, then --tricks, then the single fields.

    So a field that is given besides a trick wins. Prints the list of recipes and exits 0 for --help without a recipe.
    Raises ConfigError for an unknown recipe or trick.
    """
    return parse_extended(args, prog=prog, extend=lambda recipe: recipe)


def parse_extended(args: Sequence[str], *, prog: str, extend: Callable[[TrainConfig], C]) -> C:
    """As parse_recipe, for an entry point with fields of its own besides: `extend` adds them to the recipe's."""
    if not args or args[0] in ("-h", "--help"):
        print(recipe_help(prog))
        raise SystemExit(0 if args else 2)
    name, rest = args[0], args[1:]
    recipe = extend(find_recipe(name)())
    expected = f"\nExpected: {EXPECTED[name]}." if name in EXPECTED else ""
    about = f"{inspect.getdoc(find_recipe(name))}{expected}\n\n{_tricks_help()}"
    tricks = _find_tricks(rest)
    switched = resolve(recipe, {"tricks.on": tricks.on, "tricks.off": tricks.off})
    if _RANK == 0:
        _note_needless(name, recipe, tricks)
    config = parse(switched, rest, prog=f"{prog} {name}", description=about)
    return resolve(switched, _changes(switched, config))


@dataclass(frozen=True)
class _OnlyTricks:
    tricks: TricksConfig = field(default_factory=TricksConfig)


def _find_tricks(args: Sequence[str]) -> TricksConfig:
    """The --tricks in `args`, without the other fields, which can be judged only after the tricks are applied."""
    found, _ = tyro.cli(_OnlyTricks, args=list(args), return_unknown_args=True, add_help=False)
    return found.tricks


def _note_needless(name: str, recipe: TrainConfig, tricks: TricksConfig) -> None:
    needless = [("off", trick) for trick in tricks.off if is_off(recipe, trick)]
    needless += [("on", trick) for trick in tricks.on if is_on(recipe, trick)]
    for now, trick in needless:
        note = f"trick {trick} is {now} in recipe {name} already; --tricks.{now} {trick} changed nothing"
        print(f"note: {note}", file=sys.stderr)


def _changes(before: C, now: C) -> dict[str, Any]:
    """Dotted path -> value in `now`, of the fields that differ."""
    cls: type = type(now)
    pairs = {path: (get_at(before, path), get_at(now, path)) for path in field_kinds(cls)}
    return {path: new for path, (old, new) in pairs.items() if new != old}


def arguments_of(config: TrainConfig) -> list[str]:
    """The arguments that parse_recipe turns into `config`, which is resolved: its recipe, and each field that differs from it."""
    flags = []
    for path, value in _changes(find_recipe(config.recipe)(), config).items():
        section, _, name = path.replace("_", "-").rpartition(".")
        prefix = f"--{section}." if section else "--"
        if isinstance(value, bool):
            flags.append(f"{prefix}{'' if value else 'no-'}{name}")
        else:
            flags += [f"{prefix}{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [config.recipe, *flags]


def recipe_help(prog: str) -> str:
    """The recipes with a line each, and the next command."""
    rows = [f"  {name:20s} {summary(name)}" for name in RECIPES]
    usage = f"usage: {prog} RECIPE [--section.field value ...]"
    return "\n".join(
        [usage, "", "recipes:", *rows, "", f"{prog} RECIPE --help lists every field with its unit and range."]
    )


def _tricks_help() -> str:
    rows = [f"  {trick.name:16s} {trick.section:4s} {trick.summary}" for trick in TRICKS.values()]
    return "\n".join(["Tricks for --tricks.on and --tricks.off, with their section of the paper:", *rows])
