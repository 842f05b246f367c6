"""Small learners of each kind of step that a graph can hold, and a search for numbers of the host in their steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fasttricks.config import DataConfig, TrainConfig, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place, synchronize_batch_norm, wrap
from fasttricks.learning.precision import image_dtype
from fasttricks.learning.step_graph import StepGraph
from fasttricks.learning.teacher import Teacher
from fasttricks.models import build_model
from fasttricks.runs.log import RunLog
from fasttricks.system.distributed import World
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step
from lib.runs import own_convolutions
from lib.tiny import ALONE

CPU, CLASSES, BATCH, STEPS = torch.device("cpu"), 5, 4, 20
SMALL = {
    "model.name": "resnet8d",
    "model.width": 0.125,
    "data.image_size": 16,
    "epochs": 12,
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
    "faster biases": {"optim.bias_lr": 4.0, "optim.backend": "fused"},
    "multilabel": {"task": "multilabel", "data.label_separator": ";", "loss.mixup_alpha": 0.2},
    "segmentation": {
        "task": "segmentation",
        "loss.smoothing": 0.0,
        "loss.mixup_alpha": 0.0,
        "segment.base_size": 16,
        **{f"data.{name}": getattr(DataConfig(), name) for name in ("area", "aspect")},
    },
}


def config_of(case: dict[str, Any], ranks: int = 1) -> TrainConfig:
    fields = {**SMALL, "global_batch_size": BATCH * ranks, "precision": "fp32", **case}
    return replace_fields(RECIPES["cifar10"](), fields)


def shards_of(world: World) -> Shards:
    """Four batches an epoch, the last of which lacks an image on the first rank alone."""
    count = 4 * BATCH * world.size - 1
    return Shards(num_images=count, batch_size=BATCH, world_size=world.size, source="x")


def learner_of(config: TrainConfig, world: World = ALONE) -> Learner:
    torch.manual_seed(0)
    task = find_task(config.task)
    model = place(task.make_model(config, CLASSES), world, config.precision)
    model = synchronize_batch_norm(model, world, config.compile) if config.sync_batch_norm else model
    teacher = None
    if config.distill.teacher:
        network = build_model(config.model, CLASSES)
        teacher = Teacher(network, name="x", digest="", device=CPU, dtype=torch.float32)
    weights = torch.linspace(0.5, 1.5, CLASSES) if config.loss.class_weights else None
    more: dict[str, Any] = {"teacher": teacher, "class_weights": weights}
    return make_learner(task, config, world, shards_of(world), model, forward=wrap(model, config, world, print), **more)


def batches(config: TrainConfig, world: World = ALONE, steps: int = STEPS) -> Iterator[Any]:
    torch.manual_seed(1 + world.rank)
    left = shards_of(world).part(world.rank)
    for step in range(steps):
        count = len(left[step % 4 * BATCH :][:BATCH])
        dtype = image_dtype(config.precision, CPU)
        yield find_task(config.task).example(config, count, CLASSES, device=CPU, dtype=dtype)


def quick(config: TrainConfig) -> Any:
    return own_convolutions() if config.precision == "fp16" else nullcontext()


def trained(config: TrainConfig, graph: StepGraph | None, world: World = ALONE) -> tuple[dict[str, Any], list[Any]]:
    """The state after STEPS, and the log's share of each."""
    learner, logged = learner_of(config, world), []
    learner.graph = graph
    for batch in list(batches(config, world)):
        counted = train_step(learner, [batch])
        logged += tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, counted)
    state = learner.state_dict()
    return {**state, "judged": learner.guard.judged, "bad": learner.guard.look()}, logged


class Launches(TorchDispatchMode):
    """Each operator with its arguments: tensors made within by their order, others by their address, numbers as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._made: dict[int, tuple[int, Tensor]] = {}  # held, so that no address comes twice

    def _named(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
        key = value.untyped_storage()._cdata
        return ("made", self._made[key][0]) if key in self._made else ("given", value.data_ptr(), tuple(value.shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((str(func), tuple(map(self._named, tree_flatten((args, kwargs or {}))[0]))))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                self._made.setdefault(value.untyped_storage()._cdata, (len(self._made), value))
        return result


def frozen(config: TrainConfig, plant: Callable[[Learner], None] | None = None, world: World = ALONE) -> list[str]:
    """The operators of two replayed steps, one after the other, whose arguments differ."""
    learner, found = learner_of(config, world), []
    learner.log_loss = RunLog(Path("nowhere"), world, (), num_steps=1, steps_per_epoch=1).add  # type: ignore[method-assign]

    def record(launch: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        def replay() -> None:
            with Launches() as launches:
                launch()
            found.append(launches.calls)

        return replay, []

    learner.graph = StepGraph(record)
    if plant is not None:
        plant(learner)
    with quick(config):
        for batch in batches(config, world):
            if len(found) < 2:
                train_step(learner, [batch])
    first, second = found
    assert len(first) > 100
    differ = [a[0] for a, b in zip(first, second, strict=False) if a != b]
    return differ if len(first) == len(second) else [*differ, f"{len(first)} and {len(second)} operators"]


def plant_factor(learner: Learner) -> None:
    loss = learner.task.loss

    class Planted:
        facts = learner.task.facts

        def loss(self, learner: Learner, batch: Any, lam: Any) -> Any:
            value, images = loss(learner, batch, lam)
            return value * (1 + learner.step), images

    learner.task = Planted()  # type: ignore[assignment]
