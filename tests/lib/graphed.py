"""Small learners of each kind of step that a graph can hold, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from fasttricks.config import DataConfig, TrainConfig, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place
from fasttricks.learning.precision import image_dtype
from fasttricks.learning.teacher import Teacher
from fasttricks.models import build_model
from fasttricks.tasks import find_task
from lib.runs import own_convolutions
from lib.tiny import ALONE

CPU, CLASSES, BATCH, STEPS = torch.device("cpu"), 5, 4, 20
SHARDS = Shards(num_images=4 * BATCH - 1, batch_size=BATCH, world_size=1, source="x")
"""Four batches an epoch, of which the last lacks an image."""
SMALL = {
    "model.name": "resnet8d",
    "model.width": 0.125,
    "data.image_size": 16,
    "epochs": 12,
    "global_batch_size": BATCH,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"loss.smoothing": 0.0, "loss.mixup_alpha": 0.0},
    "tricks": {"loss.mixup_alpha": 0.2, "loss.smoothing": 0.1, "ema_decay": 0.9},
    "ours in fp32": {"loss.mixup_alpha": 0.2, "optim.backend": "fused", "ema_decay": 0.9},
    "fp16": {"precision": "fp16", "loss.mixup_alpha": 0.2, "ema_decay": 0.9, "optim.loss_scale_steps": 5},
    "skip": {"on_bad_loss": "skip", "max_loss": 1.75, "loss.mixup_alpha": 0.2},
    "skip in fp16": {"precision": "fp16", "on_bad_loss": "skip", "max_loss": 1.75},
    "distillation": {"distill.teacher": "x", "loss.mixup_alpha": 0.2},
    "class weights": {"loss.mixup_alpha": 0.2, "loss.class_weights": "balanced"},
    "slower backbone": {"optim.backbone_lr": 0.3},
    "multilabel": {"task": "multilabel", "data.label_separator": ";", "loss.mixup_alpha": 0.2},
    "segmentation": {
        "task": "segmentation",
        "loss.smoothing": 0.0,
        "loss.mixup_alpha": 0.0,
        "segment.base_size": 16,
        **{f"data.{name}": getattr(DataConfig(), name) for name in ("area", "aspect")},
    },
}


def config_of(case: dict[str, Any]) -> TrainConfig:
    return replace_fields(RECIPES["cifar10"](), {**SMALL, "precision": "fp32", **case})


def learner_of(config: TrainConfig) -> Learner:
    torch.manual_seed(0)
    task = find_task(config.task)
    model = place(task.make_model(config, CLASSES), ALONE, config.precision)
    teacher = None
    if config.distill.teacher:
        network = build_model(config.model, CLASSES)
        teacher = Teacher(network, name="x", digest="", device=CPU, dtype=torch.float32)
    weights = torch.linspace(0.5, 1.5, CLASSES) if config.loss.class_weights else None
    return make_learner(task, config, ALONE, SHARDS, model, teacher=teacher, class_weights=weights)


def batches(config: TrainConfig, steps: int = STEPS) -> Iterator[Any]:
    torch.manual_seed(1)
    for step in range(steps):
        count = SHARDS.global_count(step % len(SHARDS))
        dtype = image_dtype(config.precision, CPU)
        yield find_task(config.task).example(config, count, CLASSES, device=CPU, dtype=dtype)


def quick(config: TrainConfig) -> Any:
    return own_convolutions() if config.precision == "fp16" else nullcontext()
