"""A Run: a Learner with loaders, log, folder and stop. build.py puts it together, trainer.py goes through it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fasttricks.learning.learner import Learner
from fasttricks.learning.task import Batches
from fasttricks.runs.log import RunLog
from fasttricks.system.monitor import GpuMonitor
from fasttricks.system.profiling import StepProfiler
from fasttricks.system.signals import StopRequest


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
    conditions: dict[str, Any] = field(default_factory=dict)
    """What must be the same to resume (resume.py)."""
    epoch: int = 0
    unmeasured: bool = False
    """The last epoch is trained and its validation is still to come."""
    first_epoch: int = 0
    """Epochs that an earlier process had done, of a resumed run."""
    train_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, on the main rank; the others' is without `ranks`. A collective and a sync."""
        return {
            **super().state_dict(),
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
        """Go on from what a checkpoint kept. Not a collective, but the same for all ranks.

        Raises CheckpointError for another network's weights, DataError for a position in other data.
        """
        super().load_state_dict(state)
        self.epoch = self.first_epoch = state["epoch"]
        self.unmeasured, self.train_seconds = state["unmeasured"], state["train_seconds"]
        # at an epoch's end, where ranks may have changed in number, rank 0's will do
        ranks = state["ranks"]
        self.load_rank_state_dict(ranks[self.world.rank] if len(ranks) == self.world.size else ranks[0])

    def rank_state_dict(self) -> dict[str, Any]:
        """What this rank alone knows: where its loader and its log stand besides."""
        position = json.dumps(self.train_loader.state_dict())
        return {"loader": position, "log": self.log.state_dict(), **super().rank_state_dict()}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what rank_state_dict() gave on this rank."""
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
    """What _encode() was given, on the CPU."""
    decoded: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")
    return decoded
