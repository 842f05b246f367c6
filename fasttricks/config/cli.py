"""Command lines from dataclasses: a recipe plus single fields, a wrong name answered with the nearest right one.

The only importer of tyro, where a command line is read: a plan's launch command is written without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fasttricks.config.errors import ConfigError, require
from fasttricks.config.expected import EXPECTED
from fasttricks.config.fields import field_docs, field_kinds, get_at, own_kinds
from fasttricks.config.launch import read_launch
from fasttricks.config.networks import model_info
from fasttricks.config.options import HELP, NOTHING, Hidden, all_but_given, split_arguments, value_of
from fasttricks.config.ranges import OneOf, field_rules
from fasttricks.config.recipes import FITTED, FITTED_FIELDS, OF_THE_WEIGHTS, RECIPES, find_recipe, summary
from fasttricks.config.resolve import C, resolve
from fasttricks.config.schema import TrainConfig, TricksConfig
from fasttricks.config.tricks import TRICKS, applies, is_off, is_on

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

T = TypeVar("T")


def parse(config: T, args: Sequence[str], *, prog: str, description: str, hidden: Hidden = NOTHING) -> T:
    """`config` with the fields that `args` name replaced.

    hidden: fields that the command has no use for; they keep their value and are no options. Raises ConfigError for an unknown
    option, with the nearest right one, and for a wrong value, with the rule. Exits 0 after --help.
    """
    given, options = split_arguments(args, type(config), prog=prog, hidden=hidden)
    if given:
        raise ConfigError(f"argument = {given[0]!r}: {prog} takes no further one; an option begins with --")
    # tyro makes a parser of each field that it knows; only the help needs all
    if not set(options) & set(HELP):
        hidden = all_but_given(type(config), options)
    console = read_launch().rank == 0
    made: T = _read(config, hidden, args=options, prog=prog, description=description, console_outputs=console)
    return made


class _BrokenRuleError(Exception):
    """Takes a ConfigError, its argument, through tyro, which draws a box around a ValueError."""


def _read(config: Any, hidden: Hidden, **options: Any) -> Any:
    """tyro.cli() of a dataclass with its defaults. Raises ConfigError for a value that breaks a rule."""
    import tyro

    try:
        return tyro.cli(type(config), default=config, registry=_with_ranges(hidden), **options)
    except _BrokenRuleError as broken:
        raise broken.args[0] from None


def _replaced(default: Any, **fields: Any) -> Any:
    try:
        return dataclasses.replace(default, **fields)
    except ConfigError as error:
        raise _BrokenRuleError(error) from error


def _with_ranges(hidden: Hidden) -> ConstructorRegistry:
    """Adds the rule of a field's value to its help, and leaves the hidden fields out."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec

    registry = ConstructorRegistry()

    @registry.struct_rule
    def fields_with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
        """As tyro makes a dataclass from a default, with other help. None for any other type."""
        cls, default = info.type, info.default
        if not (dataclasses.is_dataclass(cls) and isinstance(default, cls)):
            return None
        kinds, docs, rules = own_kinds(cls), field_docs(cls), field_rules(cls)
        words = {name: f" Must be {rule.words}." for name, rule in rules.items() if not isinstance(rule, OneOf)}
        fields = [
            StructFieldSpec(
                name, kinds[name], getattr(default, name), helptext=docs.get(name, "") + words.get(name, "")
            )
            for name in (one.name for one in dataclasses.fields(cls))
            if name not in hidden.get(cls, ())
        ]
        return StructConstructorSpec(instantiate=partial(_replaced, default), fields=tuple(fields))

    return registry


Fit = Callable[[str, Callable[[str], str]], TrainConfig]
"""fit(recipe, value_of): the recipe of that name for the data and weights that the options name (runs/fitted.py)."""


Load = Callable[[str], Mapping[str, Any]]
"""load(file): the fields of --config FILE by dotted path (runs/config_file.py). Raises ConfigError."""
CONFIG = "--config"


def parse_recipe(args: Sequence[str], *, prog: str, fit: Fit | None = None, load: Load | None = None) -> TrainConfig:
    """A resolved TrainConfig from `RECIPE [--config FILE] [--section.field value ...]`.

    The recipe, by default that of FILE, comes first, then FILE, then --tricks, then the single fields. So a field that is given
    together with a trick wins. Prints the list of recipes and exits 0 for --help without a recipe.
    fit: where the recipe depends on the data. load: reads FILE. Raises ConfigError for an unknown recipe, field or trick.
    """
    return parse_extended(args, prog=prog, extend=lambda recipe: recipe, fit=fit, load=load)


def parse_extended(
    args: Sequence[str],
    *,
    prog: str,
    extend: Callable[[TrainConfig], C],
    fit: Fit | None = None,
    load: Load | None = None,
) -> C:
    """As parse_recipe, for an entry point with further fields: `extend` adds them to the recipe's."""
    names, rest = split_recipe(args, prog=prog, extend=extend)
    file, rest = take_config(rest)
    given = dict(load(file)) if load and file else {}
    _refuse_code(file, given, rest)
    label = str(given.pop("recipe", ""))
    names = names or [label] * bool(label)
    if not names:
        if (rest or file) and not set(rest) & set(HELP):
            raise ConfigError(f"recipe = '': give one: {prog} RECIPE; the recipes are {', '.join(RECIPES)}")
        print(recipe_help(prog))
        raise SystemExit(0 if rest else 2)
    name, *more = names
    recipe = extend(fit(name, partial(_value_of, args=rest, given=given)) if fit else find_recipe(name)())
    expected = f"\nExpected: {EXPECTED[name]}." if name in EXPECTED else ""
    config_help = f"{CONFIG} FILE takes fields from a .yaml or .json, or from a run folder; those given here win."
    about = f"{inspect.getdoc(find_recipe(name))}{expected}\n\n{_tricks_help()}\n\n{config_help * (load is not None)}".rstrip()
    if more:
        raise ConfigError(f"argument = {more[0]!r}: {prog} takes one recipe, and has {name}; an option begins with --")
    tricks, words = _find_tricks(rest), {word.partition("=")[0] for word in rest}
    for path, others in (("tricks.on", tricks.off), ("tricks.off", tricks.on)):  # the command line wins
        if isinstance(listed := given.get(path), list):
            given[path] = [trick for trick in listed if trick not in others]
    try:
        recipe = resolve(recipe, given) if given else recipe
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    lists = {"tricks.on": tricks.on, "tricks.off": tricks.off}
    switched = resolve(recipe, {path: list for path, list in lists.items() if f"--{path}" in words})
    if read_launch().rank == 0:
        _note_needless(name, recipe, tricks)
    config = parse(switched, rest, prog=f"{prog} {name}", description=about)
    return resolve(switched, _changes(switched, config))


def split_recipe(args: Sequence[str], *, prog: str, extend: Callable[[TrainConfig], C]) -> tuple[list[str], list[str]]:
    """(names, options) of the command line of an entry point with recipes. Raises ConfigError as split_arguments."""
    cls = type(extend(next(iter(RECIPES.values()))()))
    file, rest = take_config(args)
    names, options = split_arguments(rest, cls, prog=f"{prog} RECIPE", is_name=RECIPES.__contains__)
    return names, [*([CONFIG, file] if file else []), *options]


def take_config(args: Sequence[str]) -> tuple[str, list[str]]:
    """(FILE of --config, empty where it is not given; the other arguments). Raises ConfigError for two, and for none."""
    files, rest, words = [], [], list(args)
    while words:
        name, equals, value = (word := words.pop(0)).partition("=")
        if name != CONFIG:
            rest.append(word)
            continue
        value = value if equals else (words.pop(0) if words and not words[0].startswith("-") else "")
        require(bool(value), "config", value, f"needs a file: {CONFIG} FILE, a .yaml, a .json or a run folder")
        files.append(value)
    require(len(files) < 2, "config", " ".join(files), "takes one file; write the fields into one")
    return "".join(files), rest


def _refuse_code(file: str, given: Mapping[str, Any], args: Sequence[str]) -> None:
    """Raise ConfigError where the file names code that the command line does not name too."""
    for path in ("model.name", "distill.trust_code"):
        name = given.get(path, "")
        if isinstance(name, str) and name and model_info(name).family == "own" and value_of(path, args) != name:
            option = f"--{path.replace('_', '-')} {name}"
            rule = f"names code, which no file may run; where you trust it, add {option}"
            raise ConfigError(f"{file}: {path} = {name!r}: {rule}")


def _value_of(path: str, args: Sequence[str], given: Mapping[str, Any]) -> str:
    """The value that a field is given on the command line or, where it is not there, in the file; empty: none."""
    return value_of(path, args) or str(given.get(path, ""))


@dataclass(frozen=True)
class _OnlyTricks:
    tricks: TricksConfig = field(default_factory=TricksConfig)


def _find_tricks(args: Sequence[str]) -> TricksConfig:
    """The --tricks in `args`, without the other fields, which can be judged only after the tricks are applied."""
    found: tuple[_OnlyTricks, list[str]] = _read(
        _OnlyTricks(), NOTHING, args=list(args), return_unknown_args=True, add_help=False
    )
    return found[0].tricks


def _note_needless(name: str, recipe: TrainConfig, tricks: TricksConfig) -> None:
    needless = [("off", trick) for trick in tricks.off if is_off(recipe, trick)]
    needless += [("on", trick) for trick in tricks.on if is_on(recipe, trick)]
    notes = [f"trick {trick} is {now} in recipe {name} already; --tricks.{now} {trick}" for now, trick in needless]
    unfit = [trick for trick in tricks.off if not applies(recipe, trick)]
    notes += [f"trick {trick} does not apply to {recipe.model.name}; --tricks.off {trick}" for trick in unfit]
    for note in notes:
        print(f"note: {note} changed nothing", file=sys.stderr)


def _changes(before: C, now: C) -> dict[str, Any]:
    """Dotted path -> value in `now`, of the fields that differ."""
    cls: type = type(now)
    pairs = {path: (get_at(before, path), get_at(now, path)) for path in field_kinds(cls)}
    return {path: new for path, (old, new) in pairs.items() if new != old}


def arguments_of(config: TrainConfig) -> list[str]:
    """The arguments that parse_recipe turns into `config`, which is resolved: its recipe, and each field that differs from it."""
    flags, changes = [], _changes(find_recipe(config.recipe)(), config)
    fitted = FITTED_FIELDS if config.recipe in FITTED else ()  # its own values depend on the data and the weights
    changes |= {path: get_at(config, path) for path in (*fitted, *OF_THE_WEIGHTS.get(config.recipe, ()))}
    for path, value in changes.items():
        section, _, name = path.replace("_", "-").rpartition(".")
        prefix = f"--{section}." if section else "--"
        if isinstance(value, bool):
            flags.append(f"{prefix}{'' if value else 'no-'}{name}")
        else:
            flags += [f"{prefix}{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return [config.recipe, *flags]


def recipe_help(prog: str) -> str:
    """The recipes with a line each, and the next command."""
    rows = [f"  {name:24s} {summary(name)}" for name in RECIPES]
    usage = f"usage: {prog} RECIPE [--config FILE] [--section.field value ...]"
    return "\n".join(
        [usage, "", "recipes:", *rows, "", f"{prog} RECIPE --help lists every field with its unit and range."]
    )


def _tricks_help() -> str:
    rows = [f"  {trick.name:20s} {trick.section:4s} {trick.summary}" for trick in TRICKS.values()]
    return "\n".join(["Tricks for --tricks.on and --tricks.off, with their section of the paper:", *rows])
