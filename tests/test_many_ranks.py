"""A world of 1024 ranks, one after another in this process: who gets which image, when, and at what learning rate.

Each rank joins torch's fake process group, whose collectives return at once and compute nothing: they are called, and their
values not believed. No network is wrapped for it, as DistributedDataParallel does not work on that group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fasttricks.config import ScheduleConfig, TrainConfig
from fasttricks.data.pipeline.draws import epoch_order
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources.errors import DataError
from fasttricks.learning.learner import make_learner
from fasttricks.system.distributed import World, join_world
from fasttricks.tasks.classification import CLASSIFICATION

RANKS, NUM_IMAGES, EPOCHS = 1024, 100_003, 3


@contextmanager
def joined(rank: int, environ: pytest.MonkeyPatch) -> Iterator[World]:
    """This process as `rank` of RANKS in nodes of eight, through join_world, with the fake backend in the place of gloo."""
    init = dist.init_process_group

    def fake(*_: object, **__: object) -> None:
        init("fake", rank=rank, world_size=RANKS, store=FakeStore())

    torchrun = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank % 8, "LOCAL_WORLD_SIZE": 8}
    for name, value in {**torchrun, "MASTER_ADDR": "localhost", "MASTER_PORT": 29400}.items():
        environ.setenv(name, str(value))
    store = mock.patch.object(dist, "rendezvous", return_value=iter([(FakeStore(), rank, RANKS)]))
    with store, mock.patch.object(dist, "init_process_group", fake), join_world("cpu") as world:
        yield world


def plain_lr(config: TrainConfig, num_steps: int) -> np.ndarray:
    """The paper's words in numpy: warm-up i / m, then half a cosine (sections 3.1 and 5.1)."""
    step = np.arange(EPOCHS * num_steps)
    peak = 0.1 * config.global_batch_size / 256
    m = config.schedule.warmup_epochs * num_steps
    t, total = step - m, EPOCHS * num_steps - m
    return np.where(step < m, peak * (step + 1) / m, peak / 2 * (1 + np.cos(t * np.pi / total)))


@pytest.mark.parametrize(
    ("micro_batch", "accumulate", "batches"),
    [
        (4, 2, 25),
        pytest.param(97, 1, 2, marks=pytest.mark.slow),
    ],  # 97 or 98 images a rank: the second has a last batch that is empty on most ranks
    ids=["micro-batches", "empty-batches"],
)
def test_a_thousand_ranks_share_out_an_epoch(
    micro_batch: int, accumulate: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image once; no rank idle, that is, without an image in the epoch; counts and rates of each step those of all."""
    schedule = ScheduleConfig(warmup_epochs=1)
    global_batch = micro_batch * accumulate * RANKS
    config = TrainConfig(
        recipe="",
        epochs=EPOCHS,
        global_batch_size=global_batch,
        accumulate=accumulate,
        schedule=schedule,
        precision="fp32",
    )
    num_steps = math.ceil(batches / accumulate)
    order, rates = epoch_order(0, 1, NUM_IMAGES), plain_lr(config, num_steps)
    times_seen, sizes = np.zeros(NUM_IMAGES, int), np.zeros((RANKS, batches), int)
    announced = np.zeros((RANKS, num_steps), int)
    model = nn.Linear(1, 1)
    for rank in range(RANKS):
        with joined(rank, monkeypatch) as world:
            assert (world.rank, world.size) == (dist.get_rank(), dist.get_world_size()) == (rank, RANKS)
            world.barrier()
            world.sum_(torch.ones(1, dtype=torch.int64))
            batch_size = config.micro_batch_size(world.size)
            shards = Shards(num_images=NUM_IMAGES, batch_size=batch_size, world_size=world.size, source="")
            run = make_learner(CLASSIFICATION, config, world, shards, model)
            part = shards.part(world.rank)
            times_seen[order[part]] += 1
            sizes[rank] = [len(part[batch_size * i : batch_size * (i + 1)]) for i in range(len(shards))]
            assert run.steps_per_epoch == num_steps
            for run.step in range(num_steps):
                announced[rank, run.step] = run.images_in_step()
            np.testing.assert_allclose([run.lr_at(i) for i in range(len(rates))], rates, rtol=1e-12)
    assert (times_seen == 1).all()
    assert sizes.sum() == NUM_IMAGES
    assert sizes.sum(1).min() == 97, "a rank is idle or short"
    assert sizes.sum(1).max() == 98
    assert [shards.global_count(i) for i in range(batches)] == sizes.sum(0).tolist()
    ends = np.arange(0, batches, accumulate)
    assert (announced == np.add.reduceat(sizes.sum(0), ends)).all()
    assert shards.smallest_batch == sizes[sizes > 0].min()


def test_a_rank_without_an_image_is_refused() -> None:
    options = {"batch_size": 1, "world_size": RANKS, "source": "train"}
    assert {len(Shards(num_images=RANKS, **options).part(rank)) for rank in range(RANKS)} == {1}
    with pytest.raises(DataError, match="train: 1023 images for 1024 ranks: each rank needs at least one; use fewer"):
        Shards(num_images=RANKS - 1, **options)
