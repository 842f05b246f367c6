"""Images a second of a training step of section 6's networks, beside torchvision's own with the same weights and the same batch.

segmentation: an FCN on ResNet-50 beside fcn_resnet50, with two heads, torch's cross-entropy and SGD. detection: Faster R-CNN with
a feature pyramid beside that of fasterrcnn_resnet50_fpn; stem, first stage and batch norm are frozen. No loader. Ours is the
trainer's own train_step. Each contestant is a process of its own (step.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.step import LR, processes_of, turn
from fasttricks.config import TrainConfig, get_at, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.data.boxes.batch import BoxBatch
from fasttricks.data.masks.batch import MaskBatch
from fasttricks.data.masks.source import IGNORED
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.freezing import freeze
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World, join_world, keep_freed_memory
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step

Task = Literal["segmentation", "detection"]
NETWORK = "resnet50b"
"""The base network: torchvision's ResNet-50 has its stride in the 3x3."""
RECIPE: Mapping[Task, str] = {"segmentation": "segment-ade20k", "detection": "detect-voc"}
CLASSES: Mapping[Task, int] = {"segmentation": 150, "detection": 20}
"""Those of the recipe's data."""
SIDE: Mapping[Task, str] = {"segmentation": "data.image_size", "detection": "detect.base_size"}
"""The field of the recipe that is the (short) side of an image."""
ASPECT = 5 / 3
"""Long side of detection's images in short sides: 1000 / 600."""


@dataclass(frozen=True, kw_only=True)
class TransferCase:
    """The task, and its sizes."""

    task: Task = "segmentation"
    batch_size: int = 4
    image_size: int = 128
    """Side of the square images; of detection the short side."""
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
        changes: dict[str, Any] = {
            "model.name": NETWORK,
            "global_batch_size": self.batch_size,
            SIDE[self.task]: self.image_size,
            "sync_batch_norm": False,
            "deterministic": "off",
            "optim.base_lr": LR,
            "optim.linear_scaling": False,
            "optim.backbone_lr": 1.0,
        }
        if self.task == "detection":
            changes["detect.max_size"] = round(ASPECT * self.image_size)
        return replace_fields(RECIPES[RECIPE[self.task]](), changes)


def cases(device: torch.device) -> list[TransferCase]:
    """Small on the CPU; on a GPU the recipe's images and global batch."""
    if device.type == "cpu":
        return [TransferCase(task="segmentation", batch_size=4), TransferCase(task="detection", batch_size=2)]
    return [
        TransferCase(
            task=task, batch_size=recipe.global_batch_size, image_size=get_at(recipe, SIDE[task]), device="cuda"
        )
        for task, recipe in ((task, RECIPES[name]()) for task, name in RECIPE.items())
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


def example(case: TransferCase, world: World) -> Any:
    """A batch of the task, of noise that torch's generator draws."""
    classes = CLASSES[case.task]
    return find_task(case.task).example(case.config, case.batch_size, classes, device=world.device, dtype=torch.float32)


def torchvisions(case: TransferCase) -> nn.Module:
    """torchvision's network, of random weights that torch's generator draws."""
    return (_fcn if case.task == "segmentation" else _faster_rcnn)(case)


def _fcn(case: TransferCase) -> nn.Module:
    from torchvision.models.segmentation import fcn_resnet50

    model: nn.Module = fcn_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES[case.task], aux_loss=True)
    return model


def _faster_rcnn(case: TransferCase) -> nn.Module:
    """As fasterrcnn_resnet50_fpn makes it of trained weights, with the recipe's samples."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    for name, module in backbone.named_modules():
        if name.endswith("bn3"):
            module.weight.fill_(
                0.25
            )  # frozen statistics of random weights would let the features grow from block to block
    detect = case.config.detect
    model: nn.Module = FasterRCNN(
        backbone,
        CLASSES[case.task] + 1,
        min_size=detect.base_size,
        max_size=detect.max_size,
        rpn_pre_nms_top_n_train=detect.train_proposals,
        rpn_post_nms_top_n_train=detect.train_proposals,
        box_batch_size_per_image=detect.train_samples,
    )
    return model


def loss_of(model: nn.Module, batch: Any, case: TransferCase) -> Tensor:
    """As torchvision's references compute it: a mean over the batch."""
    return _loss_of_pixels(model, batch, case) if case.task == "segmentation" else _loss_of_boxes(model, batch)


def _loss_of_pixels(model: nn.Module, batch: MaskBatch, case: TransferCase) -> Tensor:
    outputs: Mapping[str, Tensor] = model(batch.images)
    main, auxiliary = (cross_entropy(outputs[name], batch.masks, ignore_index=IGNORED) for name in ("out", "aux"))
    return main + case.config.segment.aux_weight * auxiliary


def _loss_of_boxes(model: nn.Module, batch: BoxBatch) -> Tensor:
    pairs = zip(batch.boxes, batch.labels, strict=True)
    losses: Mapping[str, Tensor] = model(batch.images, [{"boxes": boxes, "labels": one + 1} for boxes, one in pairs])
    return torch.stack(list(losses.values())).sum()


def learner_of(case: TransferCase, world: World) -> Learner:
    """Ours with the weights of torchvisions()."""
    task, config, weights = find_task(case.task), case.config, torchvisions(case).state_dict()
    model = task.make_model(config, CLASSES[case.task])
    missing, others = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # a frozen batch norm counts none
    if missing or others:
        raise ValueError(f"not torchvision's network: {missing} {others}")
    shards = Shards(num_images=1000 * case.batch_size, batch_size=case.batch_size, world_size=1, source="noise")
    return make_learner(task, config, world, shards, freeze(place(model, world, config.precision), config.model.freeze))


def _fasttricks(case: TransferCase, world: World) -> Callable[[], None]:
    keep_freed_memory()
    batch = example(case, world)
    learner = learner_of(case, world)

    def step() -> None:
        train_step(learner, [batch])

    return step


def _torchvision(case: TransferCase, world: World, *, layout: torch.memory_format) -> Callable[[], None]:
    batch, optim = example(case, world), case.config.optim
    if isinstance(batch, MaskBatch):
        batch = MaskBatch(batch.images.contiguous(memory_format=layout), batch.masks)
    model = torchvisions(case).to(world.device, memory_format=layout)  # type: ignore[call-overload]
    options = {"momentum": optim.momentum, "nesterov": True, "weight_decay": optim.weight_decay}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, **options)

    def step() -> None:
        loss_of(model, batch, case).backward()
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
