"""The result of a finished run: summary.json, and a line for people."""

from __future__ import annotations

import json
from typing import Any

import torch

from fasttricks.learning.precision import resolve_precision
from fasttricks.runs.folder import write_json
from fasttricks.runs.metric import show_all
from fasttricks.runs.stored import BEST
from fasttricks.training.run import Run


def summarize(run: Run, metrics: dict[str, float]) -> dict[str, Any]:
    """The result of a finished run, written as summary.json and printed as one line or two. A collective."""
    best = run.best.best
    images, headline = run.epoch * run.shards.num_images, run.metrics[0]
    summary = {
        "recipe": run.config.recipe,
        **metrics,
        "epochs": run.epoch,
        "steps": run.step,
        "train_seconds": run.train_seconds,
        "images_per_sec": images / run.train_seconds,
        "device": run.world.device_name,
        "ranks": run.world.size,
        "precision": resolve_precision(run.config.precision, run.world.device),
        **run.loss_scale.report(),
        **({"skipped_losses": run.guard.skipped} if run.guard.skip else {}),
        **images_per_joule(run),
        **({"extended": run.extended} if run.extended else {}),
        **({f"best_{headline.name}": best.value, "best_epoch": best.epoch} if best is not None else {}),
        **({"stopped_early": True} if run.gave_up and run.epoch < run.config.epochs else {}),
        "bad_images": bad_images(run),
    }
    if run.world.is_main:
        write_json(run.folder / "summary.json", summary)
    if run.gave_up and best is not None and run.epoch < run.config.epochs:
        told = f"no new best {headline.label} in {run.best.since} validations (eval.patience)"
        run.log.print(f"{told}: stopped after epoch {run.epoch} of {run.config.epochs}")
    if best is not None and best.epoch < run.epoch:
        run.log.print(f"best {headline.show(best.value)} after epoch {best.epoch}: {run.folder}{BEST}")
    line = f"{show_all(run.metrics, metrics)}  {summary['images_per_sec']:,.0f} imgs/sec"
    run.log.print(f"{line}  {run.train_seconds:,.0f} s of training  everything is in {run.folder}/")
    return summary


def images_per_joule(run: Run) -> dict[str, float]:
    """Images that this process has trained on, over the energy of all ranks' GPUs since; empty where it is not known.

    The energy includes validation and the pauses. A collective.
    """
    joules = run.world.sum_(torch.tensor(run.monitor.energy_j, dtype=torch.float64, device=run.world.device)).item()
    images = (run.epoch - run.first_epoch) * run.shards.num_images
    return {"images_per_joule": images / joules} if images and joules > 0 else {}


def bad_images(run: Run) -> dict[str, str]:
    """The files, of both splits, that any rank could not use, and why: replaced in training, left out in validation.

    A collective.
    """
    known = run.world.gather(json.dumps({**run.train_loader.bad, **run.val_loader.bad}).encode())
    return dict(sorted({name: why for rank in known for name, why in json.loads(rank).items()}.items()))
