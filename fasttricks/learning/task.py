"""What a Task is to the trainer, which knows neither labels nor metrics: the seam between it and tasks/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fasttricks.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources import Source
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World

if TYPE_CHECKING:
    from fasttricks.learning.learner import Learner

Autocast = Callable[[], AbstractContextManager[object]]
"""What a forward pass runs under."""


class Batches(Protocol):
    """The batches of one split, an epoch an iteration: what the trainer asks of a loader. data.Loader is one."""

    @property
    def shards(self) -> Shards:
        """How an epoch is shared out over ranks and steps."""

    @property
    def note(self) -> str:
        """Why it is slower than it might be, for the header of a run; empty: it is not."""

    @property
    def bad(self) -> Mapping[str, str]:
        """Files that could not be used, by name, and why."""

    @property
    def operators(self) -> str:
        """Which code makes the pixels: each has other last bits."""

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""

    def __iter__(self) -> Iterator[Any]:
        """What is left of the epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON can hold it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises DataError where that was another data set, seed or sharding."""


class Task(Protocol):
    """What is learnt, from what, and by what it is judged. What a batch holds is known to its task alone."""

    @property
    def name(self) -> str:
        """As a checkpoint records it."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Of evaluate(), the headline first: what runs are compared by."""

    def open_data(self, root: str) -> tuple[Source, Source]:
        """(training, validation) data of data.root. Raises DataError."""

    def train_batches(self, config: TrainConfig, source: Source, world: World) -> Batches:
        """Training batches of this rank."""

    def val_batches(
        self, config: DataConfig, source: Source, world: World, *, batch_size: int, dtype: torch.dtype
    ) -> Batches:
        """Validation batches of this rank, images in `dtype`."""

    def make_model(self, config: ModelConfig, num_classes: int) -> nn.Module:
        """The network, in FP32 on torch's default device, in training mode. Raises ConfigError."""

    def loss(self, learner: Learner, batch: Any, draw: int) -> tuple[Tensor, int]:
        """(loss summed over the images of a micro-batch, a scalar with its graph; how many images).

        draw: the number of the micro-batch in the run, for what the loss draws at random. Never waits for the device.
        """

    def evaluate(
        self, model: nn.Module, batches: Iterable[Any], world: World, config: EvalConfig, autocast: Autocast
    ) -> dict[str, float]:
        """Each of `metrics`, val_loss and val_images, of `model` over the batches of all ranks. A collective and a sync."""

    def example(
        self, config: DataConfig, batch_size: int, num_classes: int, *, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """A training batch of random content, its images as `images`: to count or time a step, or to try sizes, with."""
