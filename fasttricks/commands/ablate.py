"""Ablate: fasttricks ablate TABLE [TABLE ...] [RECIPE] --data.root DIR [--seeds N] [--section.field value ...].

TABLE is one of the paper's (table2 .. table6), a design over a recipe's tricks (add-one, leave-one-out, factorial), or base
networks in another task (transfer-segment, transfer-detect).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence

from fasttricks.ablation.cells import DESIGNS, PAPERS_RECIPE, extend
from fasttricks.ablation.paper import PAPER_TABLES
from fasttricks.ablation.tables import TABLES, check_name, find_tables
from fasttricks.ablation.transfer import TRANSFERS
from fasttricks.commands import prog
from fasttricks.config import ConfigError, TrainConfig, read_launch
from fasttricks.config.cli import split_recipe
from fasttricks.config.recipes import OF_THE_WEIGHTS, RECIPES
from fasttricks.runs.config_file import load_config
from fasttricks.runs.fitted import fit_recipe
from fasttricks.system.command import ended_as_by_ctrl_c

PROG = prog("ablate")
USAGE = f"usage: {PROG} TABLE [TABLE ...] [RECIPE] --data.root DIR [--seeds N] [--section.field value ...]"


def main(args: Sequence[str]) -> None:
    """Train the cells of the tables that `args` name, those that are not finished yet, and print the tables."""
    from fasttricks.config.cli import parse_extended

    if not args or args[0] in ("-h", "--help"):
        print(table_help())
        raise SystemExit(0 if args else 2)
    if read_launch().size > 1:
        raise ConfigError(
            "WORLD_SIZE is set: an ablation starts the ranks of its runs itself; give --ranks, without torchrun"
        )
    names, recipe, rest = split(args)
    given: set[str] = set()

    def fit(recipe: str, value_of: Callable[[str], str]) -> TrainConfig:
        """As fit_recipe; keeps the fields that would follow the weights, were they not given."""
        given.update(filter(value_of, OF_THE_WEIGHTS.get(recipe, ())))
        return fit_recipe(recipe, value_of)

    command = f"{PROG} {' '.join(names)}"
    config = parse_extended([recipe, *rest], prog=command, extend=extend, fit=fit, load=load_config)
    tables = find_tables(names, config, given)

    from fasttricks.ablation.queue import ablate

    with ended_as_by_ctrl_c():
        failed = ablate(tables, config, command=f"{PROG} {shlex.join(args)}")
    if failed:
        print(f"error: {failed} run(s) failed, their cells stay blank; the tables name them", file=sys.stderr)
        raise SystemExit(1)


def split(args: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """(tables, recipe, the rest) of a command line. Raises ConfigError for a name that is neither, with the nearest."""
    names, rest = split_recipe(args, prog=f"{PROG} TABLE", extend=extend)
    recipe = names.pop() if names and names[-1] in RECIPES else ""
    if not names:
        raise ConfigError(f"table = '': must be given before the recipe; the tables are {', '.join(TABLES)}")
    for name in names:
        check_name(name)
    designs = [name for name in names if name in DESIGNS]
    if designs and not recipe:
        rule = f"needs a recipe for its tricks: {PROG} {designs[0]} RECIPE; the recipes are {', '.join(RECIPES)}"
        raise ConfigError(f"table = {designs[0]!r}: {rule}")
    papers = next((TRANSFERS[name].recipe for name in names if name in TRANSFERS), PAPERS_RECIPE)
    return list(dict.fromkeys(names)), recipe or papers, rest


def table_help() -> str:
    """The tables and designs with a line each, and the next command."""
    about = {
        **{name: make.__doc__ for name, make in PAPER_TABLES.items()},
        **{n: m.__doc__ for n, m in DESIGNS.items()},
        **{name: f"Base networks (--bases) in {one.task}; takes {one.recipe}." for name, one in TRANSFERS.items()},
    }
    rows = [f"  {name:16s} {(text or '').partition(chr(10))[0]}" for name, text in about.items()]
    recipe = f"RECIPE is one of {', '.join(RECIPES)}; the paper's tables take {PAPERS_RECIPE} where none is given."
    again = "The same command, given again, continues. Given several times at once, the processes share the runs."
    return "\n".join([USAGE, "", "tables:", *rows, "", recipe, again, f"{PROG} TABLE RECIPE --help lists every field."])
