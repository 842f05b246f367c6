"""Command lines from dataclasses: a recipe plus single fields, with the nearest right name for a wrong one. The only importer of tyro."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from fasttricks.config import TrainConfig, UserError
from fasttricks.recipes import RECIPES, find_recipe, summary
from fasttricks.tricks import TRICKS, apply_tricks

T = TypeVar("T")


def parse(config: T, args: Sequence[str], *, prog: str, description: str) -> T:
    """`config` with the fields that `args` name replaced. Exits 2 at a wrong field, with the nearest right one; 0 after --help."""
    return tyro.cli(type(config), default=config, args=list(args), prog=prog, description=description)


def parse_recipe(args: Sequence[str], *, prog: str) -> TrainConfig:
    """A TrainConfig from `RECIPE [--section.field value ...]`: the recipe, then --tricks, then the single fields, which win.

    Prints the list of recipes and exits 0 for --help without a recipe. Raises ConfigError for an unknown recipe or trick.
    """
    if not args or args[0] in ("-h", "--help"):
        print(recipe_help(prog))
        raise SystemExit(0 if args else 2)
    name, rest = args[0], args[1:]
    recipe = find_recipe(name)()
    about = f"{(find_recipe(name).__doc__ or '').strip()}\n\n{_tricks_help()}"
    tricks = parse(recipe, rest, prog=f"{prog} {name}", description=about).tricks
    switched, unchanged = apply_tricks(recipe, on=tricks.on, off=tricks.off)
    for trick in unchanged:
        now = "on" if trick in tricks.on else "off"
        print(f"note: trick {trick} is {now} in recipe {name} already; --tricks.{now} {trick} changed nothing", file=sys.stderr)
    config = parse(switched, rest, prog=f"{prog} {name}", description=about)
    return config if config.run_dir else dataclasses.replace(config, run_dir=f"runs/{name}")


def recipe_help(prog: str) -> str:
    """The recipes with a line each, and how to go on."""
    rows = [f"  {name:20s} {summary(name)}" for name in RECIPES]
    usage = f"usage: {prog} RECIPE [--section.field value ...]"
    return "\n".join([usage, "", "recipes:", *rows, "", f"{prog} RECIPE --help lists every field with its unit and range."])


def _tricks_help() -> str:
    rows = [f"  {trick.name:16s} {trick.section:4s} {trick.summary}" for trick in TRICKS.values()]
    return "\n".join(["Tricks for --tricks.on and --tricks.off, with their section of the paper:", *rows])


def run_main(main: Callable[[Sequence[str]], object]) -> None:
    """Run an entry point on sys.argv: a UserError is printed as one line and exits 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
