"""A Learner: the network and all that a training step changes or reads; and the Task that it learns.

Task is the seam: trainer.py knows neither labels nor metrics, a task in tasks/ knows nothing of steps, ranks or checkpoints.
training/run.py makes a Run of a Learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fasttricks.config import DataConfig, TrainConfig
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources import Source
from fasttricks.learning.batches import Batches
from fasttricks.learning.divergence import LossGuard
from fasttricks.learning.numbers import StepNumbers, draw_lam
from fasttricks.learning.optim import WeightAverage, build_optimizer, group_lrs, master_state_dict
from fasttricks.learning.precision import Autocast, LossScale, make_autocast, make_loss_scale, resolve_precision
from fasttricks.learning.schedule import learning_rate
from fasttricks.learning.step_graph import StepGraph
from fasttricks.learning.teacher import Teacher
from fasttricks.learning.teacher_cache import CachedTeacher
from fasttricks.models import BatchNormAct
from fasttricks.runs.checkpoint import load_weights
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """The facts of a task that the trainer and the commands ask for; the defaults are those of a class for each image."""

    heads: str = "classifier's"
    """Whose weights optim.backbone_lr leaves alone, in the header of a run."""
    one_output_a_class: bool = True
    """Whether the network turns N images into logits (N, K)."""
    several_labels: bool = False
    """Whether an image has any number of labels, which data.label_separator separates."""
    least_classes: int = 2
    """Classes that the data must have, at least."""
    whole_images: str = ""
    """The field of the short side of validation's whole images, on which data.image_size has no effect; empty: it shows crops."""
    loss_parts: tuple[str, ...] = ()
    """The names of the losses whose sum is the training loss, as the log shows them; empty: it has no parts."""
    steps_alike: bool = True
    """Whether a step of full batches launches the same each time, and never waits for the device: then a graph can hold it."""
    packages: tuple[str, ...] = ()
    """Packages that decode and resize its images beside DALI, and whose releases round otherwise."""


class Task(Protocol):
    """A task: its data, its loss and its metrics. Only the task knows the contents of a batch."""

    @property
    def name(self) -> str:
        """As a checkpoint records it."""

    @property
    def facts(self) -> TaskFacts:
        """The facts about it that differ from those of a class for each image."""

    def metrics_of(self, num_classes: int) -> tuple[Metric, ...]:
        """The metrics that evaluate() gives of a network for so many classes, 1 or more.

        The first is the headline, by which runs are compared: the same for every number of classes.
        """

    def open_data(self, config: DataConfig) -> tuple[Source, Source]:
        """(training, validation) data of config.root, its classes in the order of config.class_order. Raises DataError."""

    def open_split(self, config: DataConfig, split: Any, classes: Sequence[str]) -> Source:
        """One split of config.root, as a network of these classes is evaluated on. Raises DataError."""

    def train_batches(self, config: TrainConfig, source: Source, world: World) -> Batches:
        """Training batches of this rank."""

    def val_batches(
        self, config: TrainConfig, source: Source, world: World, *, batch_size: int, dtype: torch.dtype
    ) -> Batches:
        """Validation batches of this rank, images in `dtype`."""

    def make_model(self, config: TrainConfig, num_classes: int) -> nn.Module:
        """The network, in FP32 on torch's default device, in training mode. Raises ConfigError."""

    def loss(self, learner: Learner, batch: Any, lam: float | Tensor) -> tuple[Tensor, int]:
        """(loss summed over the images of a micro-batch, with its graph; how many images).

        It is a scalar, or (P,) where facts.loss_parts has P names: each of these losses. lam: as StepNumbers has it. Never waits
        for the device.
        """

    def evaluate(
        self, model: nn.Module, batches: Iterable[Any], world: World, config: TrainConfig, autocast: Autocast
    ) -> dict[str, float]:
        """Each of metrics_of(), val_images and, where the task has one, val_loss, of `model` over the batches of all ranks. A
        collective and a sync."""

    def answer(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
        num_classes: int,
    ) -> tuple[dict[str, float], Any]:
        """(the metrics as evaluate() gives them; the answers of the same pass, by class). A collective and a sync.

        commands/by_task.py says how the answers are shown; None: the task has none.
        """

    def describe(self, config: TrainConfig, source: Source, class_weights: Tensor | None) -> str:
        """A line of the run's header on the labels of the training data `source`, and the weights of the classes."""

    def example(
        self, config: TrainConfig, batch_size: int, num_classes: int, *, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """A training batch of random content, its images as `images`: to count or time a step, or to try sizes, with."""


@dataclass(kw_only=True)
class Learner:
    """The state that trainer.train_step() needs, and no more. make_learner() makes one. It has no disk and no screen."""

    task: Task
    config: TrainConfig
    world: World
    shards: Shards
    """How an epoch is shared out: arithmetic on the host, no loader."""
    model: nn.Module
    forward: nn.Module
    """`model`, or its wrapper, which compiles it and sums the gradients over ranks."""
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    average: WeightAverage | None
    autocast: Autocast
    lr_at: Callable[[int], float]
    guard: LossGuard
    norms: tuple[BatchNormAct, ...] = ()
    """The layers of `model` whose batches are counted at a step's end, together."""
    teacher: Teacher | CachedTeacher | None = None
    """The teacher of a distillation; None without one."""
    class_weights: Tensor | None = None
    """(K,) float32, on the device: the weight of each class in the loss; None: all alike."""
    exact: dict[str, Tensor] = field(default_factory=dict)
    """FP32 values, on the CPU, of the frozen weights by name, where `model` has them in FP16; else empty."""
    graph: StepGraph | None = None
    """Records the step and replays it (cuda_graph); None: each step is launched."""
    step: int = 0
    """Updates done."""

    @property
    def steps_per_epoch(self) -> int:
        """Updates an epoch; the last may have fewer images, and fewer micro-batches."""
        return count_steps(self.shards, self.config)

    @property
    def step_in_epoch(self) -> int:
        """Updates done of the current epoch; 0 at an epoch's end, when all ranks have one model."""
        return self.step % self.steps_per_epoch

    @property
    def micro_batches(self) -> range:
        """The micro-batches of the current step, by their place in the epoch."""
        first = self.step_in_epoch * self.config.accumulate
        return range(first, min(first + self.config.accumulate, len(self.shards)))

    def images_in_step(self) -> int:
        """Images of the current step, over all its micro-batches and ranks. Arithmetic only, no collective."""
        return sum(map(self.shards.global_count, self.micro_batches))

    @property
    def is_full(self) -> bool:
        """Whether each micro-batch of the current step is full on every rank. Arithmetic only: all ranks say the same."""
        return self.images_in_step() == self.shards.batch_size * self.world.size * self.config.accumulate

    def numbers(self, micro_batch: int = 0) -> StepNumbers:
        """The numbers of the current step, for one of its micro-batches. About 30 microseconds on the host; no sync."""
        config, lam = self.config, 1.0
        if (alpha := config.loss.mixup_alpha) > 0:
            draw = self.step * config.accumulate + micro_batch
            lam = draw_lam(alpha, seed=config.seed, step=draw, rank=self.world.rank)
        lrs = group_lrs(self.optimizer, self.lr_at(self.step))
        gain = 0.0 if self.average is None else self.average.gain
        return StepNumbers(self.step, self.world.size / self.images_in_step(), lam, lrs, gain)

    def log_loss(self, loss_sum: Tensor, num_images: int | Tensor) -> None:
        """Take in a micro-batch's share of the log, on the device: of a Run, which has a log."""

    def count_step(self, micro_batches: int) -> None:
        """Count a step of so many micro-batches as done: all of its effects on the host."""
        self.step += 1
        self.guard.judged += micro_batches
        if self.average is not None:
            self.average.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The state that all ranks share, as a checkpoint holds it; no copy. FP16 weights as their FP32 masters or `exact`."""
        average = {"model": None, "updates": 0} if self.average is None else self.average.state_dict()
        return {
            "step": self.step,
            "skipped_losses": self.guard.state_dict()["skipped"],
            "model": {**master_state_dict(self.model, self.optimizer), **self.exact},
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
            "average": average["model"],
            "average_updates": average["updates"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that state_dict() gave and a checkpoint kept; its `path` is the checkpoint's file.

        Raises CheckpointError for weights that are not this network's.
        """
        load_weights(self.model, state["model"], source=state["path"])
        for name, value in self.exact.items():
            value.copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.guard.load_state_dict({"skipped": state["skipped_losses"]})
        if self.average is not None:
            average = {"model": state["average"], "updates": state["average_updates"]}
            self.average.load_state_dict(average, source=state["path"])
        self.step = state["step"]

    def rank_state_dict(self) -> dict[str, Any]:
        """The state of this rank alone: within an epoch the batch-norm statistics of its own images."""
        apart = self.world.size > 1 and self.step_in_epoch > 0
        average = self.average.model if self.average is not None else None
        return {
            "buffers": dict(self.model.named_buffers()) if apart else {},
            "average_buffers": dict(average.named_buffers()) if apart and average is not None else {},
        }

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give this rank its own statistics back. After `forward` was made: DistributedDataParallel broadcasts rank 0's."""
        _copy_buffers(self.model, state["buffers"])
        if self.average is not None:
            _copy_buffers(self.average.model, state["average_buffers"])


def _copy_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    own = dict(model.named_buffers())
    for name, value in buffers.items():
        own[name].copy_(value)


def count_steps(batches: Sized, config: TrainConfig) -> int:
    """Updates an epoch takes of so many batches of a rank: of Shards or a loader."""
    return -(-len(batches) // config.accumulate)


def make_learner(
    task: Task,
    config: TrainConfig,
    world: World,
    shards: Shards,
    model: nn.Module,
    *,
    forward: nn.Module | None = None,
    teacher: Teacher | CachedTeacher | None = None,
    class_weights: Tensor | None = None,
    exact: dict[str, Tensor] | None = None,
) -> Learner:
    """A Learner at its first step. model: placed (placement.place), its parts frozen; forward: its wrapper (placement.wrap);
    None: model. class_weights: as Learner has them, on any device. exact: Learner.exact; None: empty.

    Raises ConfigError for an optimizer that cannot be had.
    """
    precision = resolve_precision(config.precision, world.device)
    optimizer = build_optimizer(model, config.optim, precision)
    exact = exact or {}
    schedule = partial(learning_rate, config=config.schedule, peak_lr=config.peak_lr)
    return Learner(
        task=task,
        config=config,
        world=world,
        shards=shards,
        model=model,
        forward=model if forward is None else forward,
        optimizer=optimizer,
        loss_scale=make_loss_scale(config.optim, precision, world.device),
        average=WeightAverage(model, config.ema_decay, optimizer, exact) if config.ema_decay else None,
        autocast=make_autocast(precision, world.device),
        lr_at=partial(schedule, steps_per_epoch=count_steps(shards, config), epochs=config.epochs),
        norms=tuple(module for module in model.modules() if isinstance(module, BatchNormAct)),
        guard=LossGuard(world, limit=config.max_loss, skip=config.on_bad_loss == "skip"),
        teacher=teacher,
        class_weights=None if class_weights is None else class_weights.to(world.device),
        exact=exact,
    )
