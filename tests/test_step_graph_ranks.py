"""The step of several ranks that is recorded and replayed: its bits, and the decisions that all ranks must share.

Over gloo, where relaunch() stands in for a CUDA graph. That NCCL's collectives can be replayed, only GPUs can show.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.futures import collect_all

from fasttricks.config import ConfigError
from fasttricks.learning import step_graph
from fasttricks.learning.learner import Learner
from fasttricks.learning.step_graph import WARM_UP, StepGraph, on_all_ranks, relaunch
from fasttricks.runs.log import TIMINGS
from fasttricks.runs.records import read_metrics
from fasttricks.system.distributed import World, join_world
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.forked import on_ranks
from lib.graphed import CASES, STEPS, config_of, frozen, plant_factor, quick, trained
from lib.states import same
from lib.tiny import configure, write_images

SYNCHRONISED = "synchronised batch norm"
RANKED = {**CASES, SYNCHRONISED: {"sync_batch_norm": True, "loss.mixup_alpha": 0.2}}
QUICK = {2: ("tricks", SYNCHRONISED), 3: ("skip in fp16",)}


def counted(world: World) -> tuple[StepGraph, list[str]]:
    """A graph that is relaunched, and a note for each replay."""
    notes: list[str] = []

    def record(launch: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        replay, result = relaunch(launch)
        return lambda: (notes.append("replayed"), replay()), result

    return StepGraph(on_all_ranks(record, world)), notes


def has_the_bits(*cases: str) -> None:
    """A rank's part. Every fourth step lacks an image on one rank alone, and no rank replays it."""
    with join_world("cpu") as world:
        for case in cases:
            config, (graph, notes) = config_of(RANKED[case], world.size), counted(world)
            with quick(config):
                plain, plain_log = trained(config, None, world)
                graphed, graphed_log = trained(config, graph, world)
            assert graph.launched == WARM_UP
            assert len(notes) == STEPS * 3 // 4 - WARM_UP
            assert same(plain, graphed), case
            assert same(plain_log, graphed_log), case
            states = [None] * world.size
            torch.distributed.all_gather_object(states, graphed["model"])
            weights = [name for name in plain["model"] if "running" not in name and "tracked" not in name]
            assert all(torch.equal(state[name], plain["model"][name]) for state in states for name in weights), case


def awaited(futures: list[Any]) -> Any:
    """As collect_all, once all is there: three ranks then add up their gradients in this thread, the one that is searched."""
    all_of_them = collect_all(futures)
    all_of_them.wait()
    return all_of_them


def launches_the_same(*cases: str) -> None:
    """A rank's part: it finds no number of the host that changes, and the one that is planted."""
    with mock.patch("fasttricks.system.rank_order.collect_all", awaited), join_world("cpu") as world:
        for case in cases:
            assert frozen(config_of(RANKED[case], world.size), world=world) == [], case
        assert frozen(config_of(RANKED[cases[0]], world.size), plant_factor, world)


def table(cases: Collection[str]) -> list[Any]:
    """Of those, on two and on three ranks; all together are slow."""
    quick = [(count, tuple(case for case in few if case in cases)) for count, few in QUICK.items()]
    return [*quick, *(pytest.param(count, tuple(cases), marks=pytest.mark.slow) for count in QUICK)]


@pytest.mark.parametrize(("count", "cases"), table(RANKED))
def test_the_steps_have_the_bits_of_the_steps_without_a_graph(count: int, cases: tuple[str, ...]) -> None:
    on_ranks(count, has_the_bits, *cases)


@pytest.mark.parametrize(
    ("count", "cases"), table(CASES)
)  # ours of a synchronised batch norm takes no mode that would see it
def test_two_steps_launch_the_same_with_the_same_numbers(count: int, cases: tuple[str, ...]) -> None:
    on_ranks(count, launches_the_same, *cases)


def fails_on_one() -> None:
    """A rank's part. The graphs of the others are gone while their errors are still there, so that NCCL's group can end."""
    made: list[weakref.ref[Any]] = []

    def record(launch: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        if world.rank == 1:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

        def replay() -> None: ...

        made.append(weakref.ref(replay))
        return replay, []

    with join_world("cpu") as world:
        error, words = (
            (RuntimeError, "^operation not permitted\n")
            if world.rank == 1
            else (
                ConfigError,
                r"^cuda_graph = True: could not be recorded on rank 1 \(operation not permitted\); leave it out$",
            )
        )
        with pytest.raises(error, match=words) as caught:
            on_all_ranks(record, world)(list)
        gc.collect()
        assert [graph() for graph in made] == [None] * (world.rank != 1) and caught.traceback


def test_where_one_rank_cannot_record_all_end_and_say_so() -> None:
    on_ranks(3, fails_on_one)


def goes_through_fit(data: str, folder: str) -> None:
    """A rank's part: runs with and without a graph, through the loader, to the last validation. Their logs are the same too."""
    step_graph.WARM_UP = 1
    states, logged = [], []
    with join_world("cpu") as world:
        for name in ("launched", "replayed"):
            options = ("--global-batch-size", "20", "--loss.mixup-alpha", "0.2", "--ema-decay", "0.9")
            run = build(configure(Path(data), Path(folder) / name, *options), world)
            if name == "replayed":
                run.graph, notes = counted(world)
            fit(run)
            assert run.graph is None or run.graph._replay is None, "it holds collectives, whose group would not end"
            states.append(copy.deepcopy(Learner.state_dict(run)))
            if world.is_main:
                records = read_metrics(run.folder)
                assert [record["step"] for record in records if "train_loss" in record] == [1, 2, 3, 4, 5, 6]
                logged.append([{name: record[name] for name in record.keys() - TIMINGS} for record in records])
        assert len(notes) == 3, "of two epochs of two full steps each, all but the first"
    assert same(*states)
    assert not logged or same(*logged)


def test_a_run_of_two_ranks_ends_with_the_same_bits(tmp_path: Path) -> None:
    """41 images: in the third step one rank has no image, and one rank one."""
    on_ranks(2, goes_through_fit, str(write_images(tmp_path / "data", train=41, val=5)), str(tmp_path))
