"""Images a second of a training step of section 6's networks, beside torchvision's own with the same weights and the same batch.

An FCN on ResNet-50 beside torchvision's fcn_resnet50: its two heads, torch's cross-entropy and SGD. No loader. Ours is the
trainer's own train_step. Each contestant is a process of its own (step.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.step import LR, processes_of, turn
from fasttricks.config import TrainConfig, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.data.masks.batch import MaskBatch
from fasttricks.data.masks.source import IGNORED
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World, join_world, keep_freed_memory
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step

Task = Literal["segmentation"]
NETWORK = "resnet50b"
"""The base network: torchvision's ResNet-50 has its stride in the 3x3."""
RECIPE: Mapping[Task, str] = {"segmentation": "segment-ade20k"}
CLASSES: Mapping[Task, int] = {"segmentation": 150}
"""Those of the recipe's data."""


@dataclass(frozen=True, kw_only=True)
class TransferCase:
    """The task, and its sizes."""

    task: Task = "segmentation"
    batch_size: int = 4
    image_size: int = 128
    device: Literal["cpu", "cuda"] = "cpu"
    ranks: int = 1

    @property
    def title(self) -> str:
        """For the head of a table."""
        where = "1 GPU" if self.device == "cuda" else "1 process"
        return f"Step, {self.task}, {NETWORK}, fp32, batch {self.batch_size}, {self.image_size} pixels, {where}"

    @property
    def config(self) -> TrainConfig:
        """The recipe at this size, with one learning rate for all weights."""
        changes = {
            "model.name": NETWORK,
            "global_batch_size": self.batch_size,
            "data.image_size": self.image_size,
            "sync_batch_norm": False,
            "deterministic": "off",
            "optim.base_lr": LR,
            "optim.backbone_lr": 1.0,
        }
        return replace_fields(RECIPES[RECIPE[self.task]](), changes)


def cases(device: torch.device) -> list[TransferCase]:
    """Small on the CPU; on a GPU the recipe's crop and global batch."""
    if device.type == "cpu":
        return [TransferCase(task=task) for task in RECIPE]
    recipes = {task: RECIPES[name]() for task, name in RECIPE.items()}
    return [
        TransferCase(task=task, batch_size=one.global_batch_size, image_size=one.data.image_size, device="cuda")
        for task, one in recipes.items()
    ]


@contextmanager
def contestants(case: TransferCase) -> Iterator[dict[str, Callable[[], float]]]:
    """Name -> a few training steps, returning images a second; the processes end with the context."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(processes_of("bench.transfer_step", name, case)) for name in CONTESTANTS}


def main(name: str, case: TransferCase) -> None:
    """A process of one contestant: a turn for each line of standard input."""
    with join_world(case.device) as world:
        torch.manual_seed(0)
        ask_for_one_order(world.device, on=False, compiled=False)
        step = CONTESTANTS[name](case, world)
        repeats = 10 if case.device == "cuda" else 1
        for _ in sys.stdin:
            print(repeats * case.batch_size / turn(step, world, repeats), flush=True)


def example(case: TransferCase, world: World) -> MaskBatch:
    """A batch of noise, drawn by torch's generator."""
    size, classes, data = case.batch_size, CLASSES[case.task], case.config.data
    batch: MaskBatch = find_task(case.task).example(data, size, classes, device=world.device, dtype=torch.float32)
    return batch


def torchvisions(case: TransferCase) -> nn.Module:
    """fcn_resnet50 with its auxiliary head, of random weights that torch's generator draws."""
    from torchvision.models.segmentation import fcn_resnet50

    model: nn.Module = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES[case.task], aux_loss=True)
    return model


def learner_of(case: TransferCase, world: World) -> Learner:
    """Ours with the weights of torchvisions()."""
    task, config, weights = find_task(case.task), case.config, torchvisions(case).state_dict()
    model = task.make_model(config, CLASSES[case.task])
    model.load_state_dict(weights)
    shards = Shards(num_images=1000 * case.batch_size, batch_size=case.batch_size, world_size=1, source="noise")
    return make_learner(task, config, world, shards, place(model, world, config.precision))


def loss_of(outputs: Mapping[str, Tensor], batch: MaskBatch, aux_weight: float) -> Tensor:
    """As torchvision's references compute it: the mean over the batch's valid pixels."""
    main, auxiliary = (cross_entropy(outputs[name], batch.masks, ignore_index=IGNORED) for name in ("out", "aux"))
    return main + aux_weight * auxiliary


def _fasttricks(case: TransferCase, world: World) -> Callable[[], None]:
    keep_freed_memory()
    batch = example(case, world)
    learner = learner_of(case, world)

    def step() -> None:
        train_step(learner, [batch])

    return step


def _torchvision(case: TransferCase, world: World, *, layout: torch.memory_format) -> Callable[[], None]:
    batch = example(case, world)
    images = batch.images.contiguous(memory_format=layout)
    model = torchvisions(case).to(world.device, memory_format=layout)  # type: ignore[call-overload]
    optim, aux_weight = case.config.optim, case.config.segment.aux_weight
    options = {"momentum": optim.momentum, "nesterov": True, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, **options)

    def step() -> None:
        loss_of(model(images), batch, aux_weight).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CONTESTANTS: Mapping[str, Callable[[TransferCase, World], Callable[[], None]]] = {
    "fasttricks": _fasttricks,
    "torchvision, channels-last": partial(_torchvision, layout=torch.channels_last),
    "torchvision, default layout": partial(_torchvision, layout=torch.contiguous_format),
}


if __name__ == "__main__":
    main(sys.argv[1], TransferCase(**json.loads(sys.argv[2])))
