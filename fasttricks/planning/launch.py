"""The command that starts the run of a plan."""

from __future__ import annotations

import dataclasses
import shlex

from fasttricks.config import TrainConfig
from fasttricks.config.cli import arguments_of
from fasttricks.config.recipes import find_recipe
from fasttricks.planning.planner import Plan

ROOT = "DIR"
"""Stands for the images where the plan names none."""


def launch_command(plan: Plan) -> str:
    """The command line of the training, to be given on each node; python alone for one GPU, torchrun for more.

    HOST stands for the first node. It names the fields that differ from the recipe's.
    """
    import torch

    from fasttricks.learning.precision import resolve_precision

    config, gpus = plan.config, plan.config.gpus
    run = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
    asked = find_recipe(run.recipe)().precision
    same = resolve_precision(asked, torch.device("cuda")) == run.precision
    data = dataclasses.replace(run.data, root=run.data.root or ROOT)
    run_dir = "" if run.run_dir == f"runs/{run.recipe}" else run.run_dir
    run = dataclasses.replace(run, data=data, run_dir=run_dir, precision=asked if same else run.precision)
    train = ["-m", "fasttricks.train", *arguments_of(run)]
    if gpus == 1:
        return shlex.join(["python", *train])
    nodes = next(nodes for nodes in range(config.nodes, gpus + 1) if gpus % nodes == 0)
    launcher = ["torchrun"]
    if nodes > 1:
        launcher += ["--nnodes", f"{nodes}", "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29400"]
    return shlex.join([*launcher, "--nproc-per-node", f"{gpus // nodes}", *train])
