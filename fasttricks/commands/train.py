"""Train a recipe: fasttricks train RECIPE [--section.field value ...]; --help lists the recipes."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttricks.commands import prog
from fasttricks.commands.by_task import commands_of
from fasttricks.config import TrainConfig, UserError, read_launch
from fasttricks.runs.begin import check_run_dir, check_unused
from fasttricks.runs.config_file import load_config
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.folder import made_by_this_launch
from fasttricks.runs.stored import named, require_weights
from fasttricks.system.process import activation, restart_count

PROG = prog("train")


def next_commands(run_dir: str, task: str = "classification") -> list[str]:
    """The next commands for a finished run, one a line, after the activation of their environment where the shell lacks it."""
    folder, activate, row = shlex.quote(run_dir), activation(), commands_of(task)
    return [
        *([f"first    {activate}"] if activate else []),
        f"evaluate {prog('evaluate')} {folder}",
        f"predict  {prog('predict')} {folder} IMAGE...{' --draw DIR' if row.no_classes and row.draw else ''}",
        f"export   {prog('export')} {folder}",
        f"curves   tensorboard --logdir {folder}",
    ]


def main(args: Sequence[str]) -> None:
    """Train the recipe that `args` ask for. A wrong argument or path is answered before torch is imported."""
    from fasttricks.config.cli import parse_recipe

    train(parse_recipe(args, prog=PROG, fit=fit_recipe, load=load_config))


class Trained(NamedTuple):
    """The outcome of a run; empty where a signal stopped it."""

    summary: dict[str, Any]
    """The content of summary.json."""
    metrics: dict[str, float]
    """Those of its task, the headline first, and val_loss where it has one."""


def train(config: TrainConfig) -> Trained:
    """Train `config`, which is resolved, to its end, or until a signal stops the run, which is then saved. A collective: every
    rank must call it.

    Raises UserError for all that the user can set right, and KeyboardInterrupt with the way to resume.
    """
    config = restarted(config)
    check_unused(config)
    check_run_dir(config)
    require_data(config)
    if not config.resume:  # a resumed run has its weights
        with named("init"):
            require_weights(config.init)

    from fasttricks.system.distributed import join_world, keep_freed_memory, leave
    from fasttricks.system.failures import lost_rank
    from fasttricks.system.files import why_refused
    from fasttricks.system.refusals import place_of, refusal
    from fasttricks.system.signals import StopRequest
    from fasttricks.trainer import Stopped, fit
    from fasttricks.training.build import build
    from fasttricks.training.run import how_to_go_on

    keep_freed_memory()
    with join_world(config.device, config.timeout_s) as world:
        stop = StopRequest(world)
        with stop.listening():
            run = build(config, world, stop)
            try:
                summary = fit(run)
                for line in next_commands(config.run_dir, config.task):
                    run.log.print(line)
                names = [*(metric.name for metric in run.metrics), "val_loss"]
                return Trained(summary, {name: summary[name] for name in names if name in summary})
            except Stopped as stopped:
                run.log.print(f"stopped {stopped}")
            except KeyboardInterrupt:
                raise KeyboardInterrupt(how_to_go_on(run)) from None
            except RuntimeError as error:
                if world.size == 1 or not lost_rank(error):
                    raise
                leave(world, error, how_to_go_on(run))
            except OSError as error:
                place = place_of(error)
                if place and not Path(place).resolve().is_relative_to(run.folder.resolve()):
                    raise UserError(f"{refusal(error)}; then {how_to_go_on(run)}") from error
                rule = why_refused(run.folder)  # a failed write, which names no path, was to the run folder
                raise UserError(f"run_dir = {config.run_dir!r}: {rule}; {how_to_go_on(run)} ({error})") from error
    return Trained({}, {})


def require_data(config: TrainConfig) -> None:
    """Raise DataError where data.root is no place of the task's data, as far as a look at it tells."""
    commands_of(config.task).require_place(config.data, "train", "val")


def restarted(config: TrainConfig) -> TrainConfig:
    """`config`, which resumes where torchrun has started its own run again."""
    if restart_count() and (read_launch().rank or made_by_this_launch(config.run_dir)):
        return dataclasses.replace(config, resume=True)
    return config
