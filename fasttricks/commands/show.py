"""Show a recipe's config: fasttricks show RECIPE [--section.field value ...], as YAML that --config takes."""

from __future__ import annotations

from collections.abc import Sequence

from fasttricks.commands import prog
from fasttricks.config.recipes import summary
from fasttricks.runs.config_file import config_yaml, load_config
from fasttricks.runs.fitted import fit_recipe

PROG = prog("show")


def main(args: Sequence[str]) -> None:
    """Print the config that train makes of `args`."""
    from fasttricks.config.cli import parse_recipe

    config = parse_recipe(args, prog=PROG, fit=fit_recipe, load=load_config)
    print(f"# {summary(config.recipe)}\n# Train it: {prog('train')} --config FILE\n{config_yaml(config)}")
