"""A step that is recorded and replayed: its bits against the step that is launched, and a search for numbers of the host in it.

Nothing is recorded here: relaunch() stands in for a CUDA graph, by the same contract."""

from __future__ import annotations

import copy
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda import _sanitizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fasttricks.config import ConfigError, TrainConfig, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.learning import step_graph
from fasttricks.learning.learner import Learner
from fasttricks.learning.step_graph import WARM_UP, StepGraph, Streams, check_graph, relaunch
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step
from lib.graphed import (
    BATCH,
    CASES,
    CLASSES,
    STEPS,
    batches,
    config_of,
    frozen,
    learner_of,
    plant_factor,
    quick,
    trained,
)
from lib.states import same


@pytest.mark.parametrize("case", CASES)
def test_the_steps_have_the_bits_of_the_steps_without_a_graph(case: str) -> None:
    config, graph = config_of(CASES[case]), StepGraph(relaunch)
    with quick(config):
        plain, plain_log = trained(config, None)
        graphed, graphed_log = trained(config, graph)
    assert graph.launched == WARM_UP < 3 * STEPS // 4, "full batches were replayed"
    assert same(plain, graphed)
    assert same(plain_log, graphed_log)
    if config.on_bad_loss == "skip":
        assert plain["bad"] is not None and 0 < plain["bad"].micro_batches < STEPS, "some steps were skipped, not all"


# ------------------------------------------------------------------------------- numbers that a recording would freeze
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


@pytest.mark.parametrize("case", ["tricks", "fp16"])
def test_a_resumed_run_warms_up_by_its_own_steps_again(case: str) -> None:
    """Stopped while it was replayed; the bits are those of a run without a graph and a stop."""
    config, stop = config_of(CASES[case]), STEPS - 2
    given = list(batches(config, steps=stop + STEPS))
    plain, first, second = (learner_of(config) for _ in range(3))
    first.graph, second.graph = StepGraph(relaunch), StepGraph(relaunch)
    with quick(config):
        for batch in given:
            train_step(plain, [batch])
        for batch in given[:stop]:
            train_step(first, [batch])
        second.load_state_dict({**copy.deepcopy(first.state_dict()), "path": "x"})
        for count, batch in enumerate(given[stop:], 1):
            train_step(second, [batch])
            assert second.graph.launched == min(WARM_UP, sum(len(one) == BATCH for one in given[stop:][:count]))
    assert first.graph.launched == WARM_UP
    assert same(plain.state_dict(), second.state_dict())


# --------------------------------------------------------------------------------------- the order of the two streams
class Stream:
    """A stream of a card that is not there: what it waits for, `judge` is told."""

    def __init__(self, judge: Judge, number: int) -> None:
        self.judge, self.number = judge, number

    def wait_stream(self, other: Stream) -> None:
        line = sys._getframe(2).f_lineno  # in StepGraph, behind Streams
        self.judge.waits.setdefault(line, 0)
        if line != self.judge.left_out:
            self.judge.waits[line] += 1
            event = self.judge.event = self.judge.event + 1
            self.judge.handler._handle_event_record(event, other.number)
            self.judge.handler._handle_event_wait(event, self.number)


class Judge(TorchDispatchMode):
    """torch's own sanitizer of CUDA's streams, which is told of each operator here as if it ran on the stream that is current.

    A storage that is let go is one that the stream on which it was made may write to from now on: so does CUDA's allocator.
    """

    def __init__(self, left_out: int) -> None:
        super().__init__()
        self.handler, self.found, self.left_out, self.event = _sanitizer.EventHandler(), [], left_out, 0
        self.waits: dict[int, int] = {}
        self.step, self.inputs = Stream(self, 1), Stream(self, 2)
        self.current = self.step
        self._held: list[Tensor] = []  # so that no storage comes twice

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def tell(self, stream: Stream, name: str, read: set[int], written: set[int]) -> None:
        aliases: dict[int, list[str]] = {key: [] for key in read | written}
        launch = self.handler._handle_kernel_launch
        self.found += launch(stream.number, read - written, written, set(), name, aliases)

    def watched(self, batch: Any) -> Any:
        for value in (value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tensor)):
            self._held.append(value.detach())
            weakref.finalize(value, self.tell, self.current, "let go", set(), {value.untyped_storage()._cdata})
        return batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        changed = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}

        def keys(values: Any) -> set[int]:
            tensors = [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
            self._held += [value.detach() for value in tensors]
            return {value.untyped_storage()._cdata for value in tensors}

        read = keys(given)
        written = keys([given[name] for name in changed & given.keys()]) | (keys(result) - read)
        if _sanitizer.FACTORY_FUNCTION_REGEX.match(func._schema.name.removeprefix("aten::")):
            read = set()  # its shape alone
        self.tell(self.current, str(func), read, written)
        return result


def loaded(judge: Judge, config: TrainConfig, steps: int, labels: Tensor) -> Iterator[Any]:
    for batch in batches(config, steps=steps):
        yield judge.watched(replace(batch, images=batch.images + 0, labels=labels[batch.labels]))


def raced(monkeypatch: pytest.MonkeyPatch, left_out: int = 0) -> Judge:
    """The judge of launched, recorded and replayed steps and a short one, without the waits of that line."""
    config, judge = config_of({"loss.mixup_alpha": 0.2}), Judge(left_out)
    monkeypatch.setattr(step_graph, "WARM_UP", 2)
    monkeypatch.setattr(
        _sanitizer, "traceback", SimpleNamespace(StackSummary=StackSummary, walk_stack=lambda _: ())
    )  # half the time
    monkeypatch.setattr(torch.cuda, "stream", judge.on)
    learner = learner_of(config)
    learner.graph = StepGraph(relaunch, Streams(judge.step, judge.inputs))  # type: ignore[arg-type]
    with judge:
        for steps in (4, 1):  # the last of four is short
            labels = torch.arange(CLASSES)  # a table of the loader's own
            for batch in learner.graph.taken(loaded(judge, config, steps, labels)):
                train_step(learner, [batch])
                del batch  # nor does the trainer hold it
    assert learner.step == 5
    return judge


def test_each_wait_between_the_streams_is_needed_and_they_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = raced(monkeypatch)
    assert judge.found == []
    assert len(judge.waits) == 5 and all(judge.waits.values())
    for line in judge.waits:
        assert raced(monkeypatch, left_out=line).found, (
            f"nothing is wrong without the wait of line {line} in step_graph.py"
        )


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
        ("cuda", 2, True, "is for one rank, and here are 2: .*; leave it out, or try --cuda-graph-ranks"),
        ("cuda", 1, find_task("detection").facts.steps_alike, "of task classification"),
    ):
        with pytest.raises(ConfigError, match=f"^cuda_graph = True: .*{rule}"):
            check_graph(config, device, ranks=ranks, steps_alike=alike)


def test_several_ranks_have_a_switch_of_their_own() -> None:
    """It allows that alone, and is refused where it has no effect."""
    allowed = config_of({"cuda_graph": True, "cuda_graph_ranks": True})
    for ranks in (1, 2, 64):
        check_graph(allowed, "cuda", ranks=ranks, steps_alike=True)
    with pytest.raises(ConfigError, match=r"^cuda_graph = True: needs a GPU"):
        check_graph(allowed, "cpu", ranks=2, steps_alike=True)
    with pytest.raises(
        ConfigError, match=r"^cuda_graph_ranks = True: has no effect without --cuda-graph; leave it out"
    ):
        check_graph(replace_fields(allowed, {"cuda_graph": False}), "cuda", ranks=2, steps_alike=True)
    assert not any(recipe().cuda_graph_ranks for recipe in RECIPES.values())


def test_a_full_batch_of_other_shapes_is_refused() -> None:
    learner = learner_of(config_of({}))
    learner.graph = StepGraph(relaunch)
    first, other = (next(batches(config_of({"data.image_size": side}))) for side in (16, 24))
    train_step(learner, [first])
    with pytest.raises(ValueError, match=r"images \(4, 3, 16, 16\) was recorded, and now it is \(4, 3, 24, 24\)"):
        train_step(learner, [other])
