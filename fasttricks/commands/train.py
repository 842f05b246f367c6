"""Train a recipe: python -m fasttricks.train RECIPE [--section.field value ...]; --help lists the recipes."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from fasttricks.commands import prog
from fasttricks.config import UserError

PROG = prog("train")


def next_commands(run_dir: str) -> list[str]:
    """What a user may do with a finished run, a command a line."""
    folder = shlex.quote(run_dir)
    return [
        f"evaluate {prog('evaluate')} {folder}",
        f"predict  {prog('predict')} {folder} IMAGE...",
        f"export   {prog('export')} {folder}",
        f"curves   tensorboard --logdir {folder}",
    ]


def main(args: Sequence[str]) -> None:
    """Train the recipe that `args` ask for. torch is imported after they are read, so that a wrong one is answered at once."""
    from fasttricks.config.cli import parse_recipe

    config = parse_recipe(args, prog=PROG)

    from fasttricks.runs.folder import made_by_this_launch
    from fasttricks.system.distributed import join_world, keep_freed_memory, leave, lost_rank
    from fasttricks.system.files import why_refused
    from fasttricks.system.process import restart_count
    from fasttricks.system.signals import StopRequest
    from fasttricks.trainer import Stopped, fit
    from fasttricks.training.build import build
    from fasttricks.training.run import how_to_go_on

    keep_freed_memory()
    with join_world(config.device, config.timeout_s) as world:
        if restart_count() and (not world.is_main or made_by_this_launch(config.run_dir)):
            config = dataclasses.replace(config, resume=True)  # torchrun has started its own run again
        stop = StopRequest(world)
        with stop.listening():
            run = build(config, world, stop)
            try:
                fit(run)
                for line in next_commands(config.run_dir):
                    run.log.print(line)
            except Stopped as stopped:
                run.log.print(f"stopped {stopped}")
            except KeyboardInterrupt:
                raise KeyboardInterrupt(how_to_go_on(run)) from None
            except RuntimeError as error:
                if world.size == 1 or not lost_rank(error):
                    raise
                leave(world, error, how_to_go_on(run))
            except OSError as error:  # in training only the run folder is written to
                rule = why_refused(run.folder)
                raise UserError(f"run_dir = {config.run_dir!r}: {rule}; {how_to_go_on(run)} ({error})") from error
