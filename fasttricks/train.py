"""Train a recipe: python -m fasttricks.train RECIPE [--section.field value ...]; --help lists the recipes."""

from __future__ import annotations

from collections.abc import Sequence

from fasttricks.config import UserError
from fasttricks.extras import require_train_extra

PROG = "python -m fasttricks.train"


def main(args: Sequence[str]) -> None:
    """Train the recipe that `args` ask for. torch is imported after they are read, so that a wrong one is answered at once."""
    from fasttricks.cli import parse_recipe

    config = parse_recipe(args, prog=PROG)

    from fasttricks.build import build
    from fasttricks.distributed import join_world, keep_freed_memory
    from fasttricks.trainer import fit, how_to_go_on

    keep_freed_memory()
    with join_world(config.device) as world:
        run = build(config, world)
        try:
            fit(run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_go_on(run)) from None
        except OSError as error:  # in training only the run folder is written to
            rule = f"must be on a disk with room that this process may write to ({error})"
            raise UserError(f"run_dir = {config.run_dir!r}: {rule}; free some; {how_to_go_on(run)}") from error


if __name__ == "__main__":
    require_train_extra()
    from fasttricks.cli import run_main

    run_main(main)
