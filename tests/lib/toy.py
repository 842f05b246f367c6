"""A Task that the project does not know: how red an image is. Its batches have no labels, its metric is its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasttricks.config import DataConfig, TrainConfig
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources import Source, find_dataset
from fasttricks.learning.batches import Batches
from fasttricks.learning.learner import Learner, TaskFacts
from fasttricks.learning.precision import Autocast
from fasttricks.models import build_model
from fasttricks.runs.metric import Metric
from fasttricks.system.distributed import World, join_world
from fasttricks.tasks.classification import CLASSIFICATION


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images (N, 3, S, S) and how red each is: the mean of its first channel, (N,) float32."""

    images: Tensor
    redness: Tensor


class Unlabelled:
    """`batches` of a loader without their labels."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self.shards: Shards = batches.shards
        self.note, self.operators = batches.note, batches.operators

    @property
    def bad(self) -> Mapping[str, str]:
        return self._batches.bad

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Pictures]:
        for batch in self._batches:
            yield Pictures(batch.images, batch.images[:, 0].float().mean((1, 2)))

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state)


class Redness:
    """One output, its squared error, and as metric the share of the variance that it explains."""

    name = "redness"
    facts = TaskFacts(one_output_a_class=False)

    def metrics_of(self, num_classes: int) -> tuple[Metric, ...]:
        return (Metric("explained", "explained variance", "%", ("Redness", "variance explained (%)")),)

    def open_data(self, config: DataConfig) -> tuple[Source, Source]:
        return find_dataset(config)

    def open_split(self, config: DataConfig, split: Any, classes: Sequence[str]) -> Source:
        return CLASSIFICATION.open_split(config, split, classes)

    def train_batches(self, config: TrainConfig, source: Source, world: World) -> Batches:
        return Unlabelled(CLASSIFICATION.train_batches(config, source, world))

    def val_batches(
        self, config: TrainConfig, source: Source, world: World, *, batch_size: int, dtype: torch.dtype
    ) -> Batches:
        return Unlabelled(CLASSIFICATION.val_batches(config, source, world, batch_size=batch_size, dtype=dtype))

    def make_model(self, config: TrainConfig, num_classes: int) -> nn.Module:
        return build_model(config.model, 1)

    def loss(self, learner: Learner, batch: Pictures, lam: float | Tensor) -> tuple[Tensor, int]:
        with learner.autocast():
            found = learner.forward(batch.images)
        return (found[:, 0].float() - batch.redness).square().sum(), len(batch.redness)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, batches: Iterable[Pictures], world: World, config: TrainConfig, autocast: Autocast
    ) -> dict[str, float]:
        sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # images, error, redness, its square
        model.eval()
        for batch in batches:
            with autocast():
                error = (model(batch.images)[:, 0].double() - batch.redness).square().sum()
            red = batch.redness.double()
            sums += torch.stack([torch.tensor(float(len(red))), error, red.sum(), red.square().sum()])
        model.train()
        count, error, red, squares = world.sum_(sums).tolist()
        explained = 100 * (1 - error / (squares - red**2 / count))
        return {"explained": explained, "val_loss": error / count, "val_images": int(count)}

    def answer(
        self,
        model: nn.Module,
        batches: Iterable[Pictures],
        world: World,
        config: TrainConfig,
        autocast: Autocast,
        num_classes: int,
    ) -> tuple[dict[str, float], None]:
        return self.evaluate(model, batches, world, config, autocast), None

    def describe(self, config: TrainConfig, source: Source, class_weights: Tensor | None) -> str:
        return "no labels"

    def example(
        self, config: TrainConfig, batch_size: int, num_classes: int, *, device: torch.device, dtype: torch.dtype
    ) -> Pictures:
        side = config.data.image_size
        return Pictures(
            torch.randn(batch_size, 3, side, side, device=device, dtype=dtype), torch.randn(batch_size, device=device)
        )


def train(run_dir: Path, data: Path, *options: str) -> None:
    """Train it as fasttricks.train does, on the ranks that the environment says."""
    from fasttricks.trainer import fit
    from fasttricks.training.build import build
    from lib.tiny import configure

    with join_world("cpu") as world:
        fit(build(configure(data, run_dir, *options), world, task=Redness()))
