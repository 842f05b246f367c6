"""A run written down: checkpoints while it trains, none of them of a run that has diverged, and the summary at its end."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import torch

from fasttricks.learning.divergence import MOST_SKIPPED, DivergedError, first_not_finite
from fasttricks.learning.optim import master_state_dict
from fasttricks.learning.precision import resolve_precision
from fasttricks.runs.checkpoint import checkpoint_path, keep_newest, newest_checkpoint, save_checkpoint
from fasttricks.runs.folder import write_json
from fasttricks.tasks.classification import Metrics
from fasttricks.training.run import Run

KEPT_CHECKPOINTS = 2


def save(run: Run) -> None:
    """Write a checkpoint and drop the oldest. A collective, and a sync: every rank adds what it alone knows.

    Never replaces a good one by a bad: raises DivergedError where a loss since the last look, or a weight, is no use.
    """
    check_losses(run)
    ranks = run.world.collect(encode(rank_state(run)))
    if not run.world.is_main:
        return
    state = {
        "config": json.dumps(dataclasses.asdict(run.config)),
        "classes": list(run.classes),
        "fingerprint": run.fingerprint,
        "hardware": run.world.device_name,
        "step": run.step,
        "epoch": run.epoch,
        "step_in_epoch": run.step_in_epoch,
        "unmeasured": run.unmeasured,
        "train_seconds": run.train_seconds,
        "skipped_losses": run.guard.skipped,
        "model": master_state_dict(run.model, run.optimizer),
        "optimizer": run.optimizer.state_dict(),
        "loss_scale": run.loss_scale.state_dict(),
        "average": run.average.model.state_dict() if run.average is not None else None,
        "average_updates": run.average.num_updates if run.average is not None else 0,
        "ranks": [torch.load(io.BytesIO(rank), weights_only=True, map_location="cpu") for rank in ranks],
    }
    if bad := first_not_finite(state):
        rule = "must be finite to be saved: the run has diverged; lower --optim.base-lr in a new run"
        raise DivergedError(f"{bad} after step {run.step}: {rule}; {last_good(run)}")
    folder = run.folder / "checkpoints"
    save_checkpoint(checkpoint_path(folder, run.step), state)
    keep_newest(folder, KEPT_CHECKPOINTS, also=lambda step: step % run.steps_per_epoch == 0)


def rank_state(run: Run) -> dict[str, Any]:
    """What this rank alone knows: where its loader and its log stand and, within an epoch, its batch-norm statistics."""
    apart = run.world.size > 1 and run.step_in_epoch > 0
    average = run.average.model if run.average is not None else None
    return {
        "loader": json.dumps(run.train_loader.state_dict()),
        "log": run.log.state(),
        "buffers": dict(run.model.named_buffers()) if apart else {},
        "average_buffers": dict(average.named_buffers()) if apart and average is not None else {},
    }


def encode(state: dict[str, Any]) -> bytes:
    """`state` as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def last_good(run: Run) -> str:
    """Names the newest checkpoint, in words."""
    newest = newest_checkpoint(run.folder / "checkpoints")
    return f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"


def how_to_go_on(run: Run) -> str:
    """What to tell the user of a run that failed before its end."""
    newest = newest_checkpoint(run.folder / "checkpoints")
    kept = f"from {newest}" if newest else "from the beginning, as no checkpoint was saved yet"
    return f"add --resume to the same command to go on {kept}"


def check_losses(run: Run) -> None:
    """Raise DivergedError where a loss since the last look was bad. A collective and a sync."""
    bad = run.guard.look()
    if bad is None or (run.guard.skip and not bad.hopeless):
        return
    lr, scale = run.lr_at(bad.step), run.loss_scale.report().get("loss_scale", 1.0)
    what = f"loss = {bad.loss:g} in step {bad.step + 1} at lr {lr:.4g}, loss scale {scale:g}"
    what += f", and {MOST_SKIPPED} or more in a row" if run.guard.skip else ""
    rule = f"must be finite and at most max_loss ({run.config.max_loss:g})"
    way_out = "lower --optim.base-lr or lengthen --schedule.warmup-epochs in a new run"
    way_out += "" if run.guard.skip else ", or resume with --on-bad-loss skip"
    raise DivergedError(f"{what}: {rule}; {way_out}; {last_good(run)}")


def images_per_joule(run: Run) -> dict[str, float]:
    """Images that this process has trained on, over the energy of all ranks' GPUs since; empty where it is not known.

    Validation and what came between are in the energy. A collective.
    """
    joules = run.world.sum_(torch.tensor(run.monitor.energy_j, dtype=torch.float64, device=run.world.device)).item()
    images = (run.epoch - run.first_epoch) * run.num_train_images
    return {"images_per_joule": images / joules} if images and joules > 0 else {}


def bad_images(run: Run) -> dict[str, str]:
    """The files, of both splits, that any rank could not use, and why: replaced in training, left out in validation.

    A collective.
    """
    known = run.world.gather(json.dumps(run.train_loader.bad | run.val_loader.bad).encode())
    return dict(sorted({name: why for rank in known for name, why in json.loads(rank).items()}.items()))


def summarize(run: Run, metrics: Metrics) -> dict[str, Any]:
    """The result of a finished run, written as summary.json and printed as one line. A collective."""
    images = run.config.epochs * run.num_train_images
    summary = {
        "recipe": run.config.recipe,
        "top1": metrics.top1,
        "top5": metrics.top5,
        "val_loss": metrics.loss,
        "val_images": metrics.images,
        "epochs": run.config.epochs,
        "steps": run.step,
        "train_seconds": run.train_seconds,
        "images_per_sec": images / run.train_seconds,
        "device": run.world.device_name,
        "ranks": run.world.size,
        "precision": resolve_precision(run.config.precision, run.world.device),
        **run.loss_scale.report(),
        **({"skipped_losses": run.guard.skipped} if run.guard.skip else {}),
        **images_per_joule(run),
        "bad_images": bad_images(run),
    }
    if run.world.is_main:
        write_json(run.folder / "summary.json", summary)
    line = f"top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  {summary['images_per_sec']:,.0f} imgs/sec"
    run.log.print(f"{line}  {run.train_seconds:,.0f} s of training  everything is in {run.folder}/")
    return summary
