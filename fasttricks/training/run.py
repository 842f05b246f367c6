"""A Run: a Learner with loaders, log, folder and stop; and its checkpoints, none of them of a run that has diverged.

build.py puts it together, trainer.py goes through it.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttricks.learning.batches import Batches
from fasttricks.learning.divergence import MOST_SKIPPED, DivergedError, first_not_finite
from fasttricks.learning.learner import Learner
from fasttricks.runs.checkpoint import save_checkpoint
from fasttricks.runs.log import RunLog
from fasttricks.runs.metric import Metric
from fasttricks.runs.stored import BEST_FILE, checkpoint_path, keep_copy, keep_newest, newest_checkpoint
from fasttricks.system.monitor import GpuMonitor
from fasttricks.system.profiling import StepProfiler
from fasttricks.system.signals import StopRequest
from fasttricks.training.best import BestSoFar

KEPT_CHECKPOINTS = 2


@dataclass(kw_only=True)
class Run(Learner):
    """`step` counts updates done, `epoch` epochs done."""

    classes: tuple[str, ...]
    train_loader: Batches
    val_loader: Batches
    folder: Path
    log: RunLog
    monitor: GpuMonitor
    profiler: StepProfiler
    stop: StopRequest
    claim: AbstractContextManager[object] = field(default_factory=nullcontext)
    """On `folder`, of the main rank: no other process writes to it."""
    conditions: dict[str, Any] = field(default_factory=dict)
    """The facts that must be the same to resume (resume.py)."""
    extended: list[dict[str, Any]] = field(default_factory=list)
    """How it got more epochs than it began with: from_epochs, to_epochs, the step at which that was, when."""
    epoch: int = 0
    unmeasured: bool = False
    """The last epoch is trained and its validation is still to come."""
    first_epoch: int = 0
    """Epochs that an earlier process had done, of a resumed run."""
    train_seconds: float = 0.0
    best: BestSoFar = field(default_factory=BestSoFar)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of its validations, the headline first."""
        return self.task.metrics_of(len(self.classes))

    @property
    def gave_up(self) -> bool:
        """Whether early stopping (eval.patience) has ended it."""
        return self.best.gives_up(self.config.eval.patience)

    def log_loss(self, loss_sum: Tensor, num_images: int | Tensor) -> None:
        """Add it to the log's sums."""
        self.log.add(loss_sum, num_images)

    def count_step(self, micro_batches: int) -> None:
        """As a Learner does, and for the log."""
        super().count_step(micro_batches)
        self.log.stepped()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint on the main rank; on the others without `ranks`. A collective and a sync."""
        return {
            **super().state_dict(),
            **({"extended": json.dumps(self.extended)} if self.extended else {}),
            **self.best.state_dict(),
            "task": self.task.name,
            "config": json.dumps(dataclasses.asdict(self.config)),
            "classes": list(self.classes),
            "fingerprint": json.dumps(self.conditions),
            "hardware": self.world.device_name,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "unmeasured": self.unmeasured,
            "train_seconds": self.train_seconds,
            "ranks": [_decode(rank) for rank in self.world.collect(_encode(self.rank_state_dict()))],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint. Not a collective, but the same for all ranks.

        Raises CheckpointError for another network's weights, DataError for a position in other data.
        """
        super().load_state_dict(state)
        self.best.load_state_dict(state)
        self.epoch = self.first_epoch = state["epoch"]
        self.unmeasured, self.train_seconds = state["unmeasured"], state["train_seconds"]
        # at an epoch's end, where ranks may have changed in number, rank 0's will do
        ranks = state["ranks"]
        self.load_rank_state_dict(ranks[self.world.rank] if len(ranks) == self.world.size else ranks[0])

    def rank_state_dict(self) -> dict[str, Any]:
        """The state of this rank alone, with the positions of its loader and its log."""
        position = json.dumps(self.train_loader.state_dict())
        return {"loader": position, "log": self.log.state_dict(), **super().rank_state_dict()}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that rank_state_dict() gave on this rank."""
        super().load_rank_state_dict(state)
        position = json.loads(state["loader"])
        if not self.step_in_epoch:  # at an epoch's end nothing else depends on how it is shared out
            world, batch_size = self.world, self.shards.batch_size
            position |= {"rank": world.rank, "world_size": world.size, "batch_size": batch_size}
        self.train_loader.load_state_dict(position)
        self.log.load_state_dict(state["log"])


def _encode(state: dict[str, Any]) -> bytes:
    """`state` as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _decode(state: bytes) -> dict[str, Any]:
    """The values that _encode() got, on the CPU."""
    decoded: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")
    return decoded


# ------------------------------------------------------------------------------------------------------- checkpoints
def save(run: Run) -> None:
    """Write a checkpoint and drop the oldest. A collective, and a sync: every rank adds its own state.

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
    if run.best.best is not None and run.best.best.step == run.step and not run.unmeasured:
        keep_copy(checkpoint_path(folder, run.step), BEST_FILE, again=True)
    keep_newest(folder, KEPT_CHECKPOINTS, also=lambda step: step % run.steps_per_epoch == 0)


def last_good(run: Run) -> str:
    """Names the newest checkpoint, in words."""
    newest = newest_checkpoint(run.folder / "checkpoints")
    return f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"


def how_to_go_on(run: Run) -> str:
    """Advice for the user of a run that failed before its end."""
    newest = newest_checkpoint(run.folder / "checkpoints")
    kept = f"from {newest}" if newest else "from the beginning, as there is no checkpoint"
    return f"add --resume to the same command to resume {kept}"


def check_losses(run: Run) -> None:
    """Raise DivergedError where a loss since the last look was bad. A collective and a sync."""
    bad = run.guard.look()
    if bad is None or (run.guard.skip and not bad.hopeless):
        return
    lr, scale = run.lr_at(bad.step), run.loss_scale.report().get("loss_scale", 1.0)
    found = f"loss = {bad.loss:g} in step {bad.step + 1} at lr {lr:.4g}, loss scale {scale:g}"
    found += f", and {MOST_SKIPPED} or more in a row" if run.guard.skip else ""
    rule = f"must be finite and at most max_loss ({run.config.max_loss:g})"
    way_out = "lower --optim.base-lr or lengthen --schedule.warmup-epochs in a new run"
    way_out += "" if run.guard.skip else ", or resume with --on-bad-loss skip"
    raise DivergedError(f"{found}: {rule}; {way_out}; {last_good(run)}")
