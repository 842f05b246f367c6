"""A run and all it is made of. build.py puts it together, trainer.py goes through it, saving.py writes it down."""

from __future__ import annotations

from collections.abc import Callable, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fasttricks.config import TrainConfig
from fasttricks.data.pipeline.loader import Loader
from fasttricks.learning.divergence import LossGuard
from fasttricks.learning.optim import WeightAverage
from fasttricks.learning.precision import LossScale
from fasttricks.learning.teacher import Teacher
from fasttricks.learning.teacher_cache import CachedTeacher
from fasttricks.runs.log import RunLog
from fasttricks.system.distributed import World
from fasttricks.system.monitor import GpuMonitor
from fasttricks.system.profiling import StepProfiler
from fasttricks.system.signals import StopRequest


@dataclass
class Run:
    """`step` counts updates done, `epoch` epochs done."""

    config: TrainConfig
    world: World
    classes: tuple[str, ...]
    num_train_images: int
    model: nn.Module
    forward: nn.Module
    """`model`, or what wraps it to sum the gradients over ranks."""
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    average: WeightAverage | None
    train_loader: Loader
    val_loader: Loader
    autocast: Callable[[], AbstractContextManager[object]]
    lr_at: Callable[[int], float]
    folder: Path
    log: RunLog
    monitor: GpuMonitor
    profiler: StepProfiler
    guard: LossGuard
    stop: StopRequest
    teacher: Teacher | None = None
    """Of a distillation; None without."""
    teacher_cache: CachedTeacher | None = None
    """Asked in the teacher's place where the config says so."""
    fingerprint: str = "{}"
    """JSON of what must be the same to resume (resume.py)."""
    step: int = 0
    epoch: int = 0
    unmeasured: bool = False
    """The last epoch is trained and its validation is still to come."""
    first_epoch: int = 0
    """Epochs that an earlier process had done, of a resumed run."""
    train_seconds: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Updates an epoch; the last may have fewer images, and fewer micro-batches."""
        return count_steps(self.train_loader, self.config)

    @property
    def step_in_epoch(self) -> int:
        """Updates done of the epoch at hand; 0 at an epoch's end, when all ranks have one model."""
        return self.step % self.steps_per_epoch

    def images_in_step(self) -> int:
        """Images of the step at hand, over all its micro-batches and ranks. Arithmetic only, no collective."""
        first = self.step_in_epoch * self.config.accumulate
        last = min(first + self.config.accumulate, len(self.train_loader))
        return sum(map(self.train_loader.global_count, range(first, last)))


def count_steps(loader: Sized, config: TrainConfig) -> int:
    """Updates an epoch takes with `loader`, whose length is its batches an epoch."""
    return -(-len(loader) // config.accumulate)
