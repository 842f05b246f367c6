"""A step that is recorded and replayed: its bits against the step that is launched, and a search for numbers of the host in it.

Nothing is recorded here: relaunch() stands in for a CUDA graph, by the same contract."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fasttricks.config import ConfigError, DataConfig, TrainConfig, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place
from fasttricks.learning.precision import image_dtype
from fasttricks.learning.step_graph import WARM_UP, StepGraph, check_graph, relaunch
from fasttricks.learning.teacher import Teacher
from fasttricks.models import build_model
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step
from lib.runs import own_convolutions
from lib.states import same
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


def trained(config: TrainConfig, graph: StepGraph | None) -> tuple[dict[str, Any], list[Any]]:
    """The state after STEPS, and the log's share of each."""
    learner, logged = learner_of(config), []
    learner.graph = graph
    for batch in list(batches(config)):
        counted = train_step(learner, [batch])
        logged += tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, counted)
    state = learner.state_dict()
    return {**state, "judged": learner.guard.judged, "bad": learner.guard.look()}, logged


def quick(config: TrainConfig) -> Any:
    return own_convolutions() if config.precision == "fp16" else nullcontext()


@pytest.mark.parametrize("case", CASES)
def test_the_steps_have_the_bits_of_the_steps_without_a_graph(case: str) -> None:
    config, graph = config_of(CASES[case]), StepGraph(BATCH, relaunch)
    with quick(config):
        plain, plain_log = trained(config, None)
        graphed, graphed_log = trained(config, graph)
    assert graph.launched == WARM_UP < 3 * STEPS // 4, "full batches were replayed"
    assert same(plain, graphed)
    assert same(plain_log, graphed_log)
    if config.on_bad_loss == "skip":
        assert plain["bad"] is not None and 0 < plain["bad"].micro_batches < STEPS, "some steps were skipped, not all"


# ------------------------------------------------------------------------------- numbers that a recording would freeze
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


def frozen(config: TrainConfig, plant: Callable[[Learner], None] | None = None) -> list[str]:
    """The operators of two replayed steps, one after the other, whose arguments differ."""
    learner, found = learner_of(config), []

    def record(launch: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        def replay() -> None:
            with Launches() as launches:
                launch()
            found.append(launches.calls)

        return replay, []

    learner.graph = StepGraph(BATCH, record)
    if plant is not None:
        plant(learner)
    full = [batch for batch in batches(config, 2 * STEPS) if len(batch) == BATCH]
    with quick(config):
        for batch in full[: WARM_UP + 2]:
            train_step(learner, [batch])
    first, second = found
    assert len(first) > 100
    differ = [a[0] for a, b in zip(first, second, strict=False) if a != b]
    return differ if len(first) == len(second) else [*differ, f"{len(first)} and {len(second)} operators"]


@pytest.mark.parametrize("case", CASES)
def test_two_steps_launch_the_same_with_the_same_numbers(case: str) -> None:
    assert frozen(config_of(CASES[case])) == []


def plant_rate(learner: Learner) -> None:
    learner.lr_at = lambda step: 0.1
    step = learner.optimizer.step
    learner.optimizer.step = lambda *args, **more: (
        [  # type: ignore[method-assign]
            group.update(lr=0.1 / (1 + learner.step)) for group in learner.optimizer.param_groups
        ]
        and step(*args, **more)
    )


def plant_factor(learner: Learner) -> None:
    loss = learner.task.loss

    class Planted:
        facts = learner.task.facts

        def loss(self, learner: Learner, batch: Any, lam: Any) -> Any:
            value, images = loss(learner, batch, lam)
            return value * (1 + learner.step), images

    learner.task = Planted()  # type: ignore[assignment]


def plant_gain(learner: Learner) -> None:
    assert learner.average is not None
    blend = learner.average.blend
    learner.average.blend = lambda gain: blend(1 / (2 + learner.step))  # type: ignore[method-assign]


def plant_choice(learner: Learner) -> None:
    """Launches more in each second step."""
    blend = learner.guard.judge
    learner.guard.judge = lambda *args: (torch.ones(1) if learner.step % 2 else 0, blend(*args))[1]  # type: ignore[method-assign]


@pytest.mark.parametrize("plant", [plant_rate, plant_factor, plant_gain, plant_choice])
def test_a_number_of_the_host_is_found(plant: Callable[[Learner], None]) -> None:
    assert frozen(config_of(CASES["tricks"]), plant) != []


# ------------------------------------------------------------------------------------------------------------- refusals
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "micro-batches": ({"accumulate": 2, "global_batch_size": 8}, "holds one micro-batch, and accumulate is 2"),
    "compiled graphs": ({"compile": "reduce-overhead"}, "take --compile default"),
    "compiled graphs, tuned": ({"compile": "max-autotune"}, "take --compile max-autotune-no-cudagraphs"),
    "a profile": ({"profile": True}, "leave out --profile"),
    "growing images": ({"schedule.first_size": 0.5}, "schedule.first_size has them grow"),
    "a cache": ({"distill.teacher": "x", "distill.cache": "y"}, "holds no cache of the teacher's logits"),
    "apex": ({"optim.backend": "apex"}, "take --optim.backend auto, torch or fused"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_no_graph_holds_is_refused_by_name(name: str) -> None:
    changes, rule = REFUSED[name]
    config = config_of({**changes, "cuda_graph": True})
    with pytest.raises(ConfigError, match=f"^cuda_graph = True: .*{re.escape(rule)}"):
        check_graph(config, "cuda", ranks=1, steps_alike=True)
    check_graph(replace_fields(config, {"cuda_graph": False}), "cuda", ranks=1, steps_alike=True)


def test_so_are_a_cpu_several_ranks_and_detection() -> None:
    config = config_of({"cuda_graph": True})
    check_graph(config, "cuda", ranks=1, steps_alike=True)
    for device, ranks, alike, rule in (
        ("cpu", 1, True, "needs a GPU; leave it out"),
        ("cuda", 2, True, "is for one rank, and here are 2"),
        ("cuda", 1, find_task("detection").facts.steps_alike, "of task classification"),
    ):
        with pytest.raises(ConfigError, match=f"^cuda_graph = True: .*{rule}"):
            check_graph(config, device, ranks=ranks, steps_alike=alike)


def test_a_full_batch_of_other_shapes_is_refused() -> None:
    learner = learner_of(config_of({}))
    learner.graph = StepGraph(BATCH, relaunch)
    first, other = (next(batches(config_of({"data.image_size": side}))) for side in (16, 24))
    train_step(learner, [first])
    with pytest.raises(ValueError, match=r"images \(4, 3, 16, 16\) was recorded, and now it is \(4, 3, 24, 24\)"):
        train_step(learner, [other])
