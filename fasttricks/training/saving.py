"""Checkpoints of a run while it trains, none of them of a run that has diverged."""

from __future__ import annotations

from fasttricks.learning.divergence import MOST_SKIPPED, DivergedError, first_not_finite
from fasttricks.runs.checkpoint import checkpoint_path, keep_newest, newest_checkpoint, save_checkpoint
from fasttricks.training.run import Run

KEPT_CHECKPOINTS = 2


def save(run: Run) -> None:
    """Write a checkpoint and drop the oldest. A collective, and a sync: every rank adds what it alone knows.

    Never replaces a good one by a bad: raises DivergedError where a loss since the last look, or a weight, is no use.
    """
    check_losses(run)
    state = run.state_dict()
    if not run.world.is_main:
        return
    if bad := first_not_finite(state):
        rule = "must be finite to be saved: the run has diverged; lower --optim.base-lr in a new run"
        raise DivergedError(f"{bad} after step {run.step}: {rule}; {last_good(run)}")
    folder = run.folder / "checkpoints"
    save_checkpoint(checkpoint_path(folder, run.step), state)
    keep_newest(folder, KEPT_CHECKPOINTS, also=lambda step: step % run.steps_per_epoch == 0)


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
