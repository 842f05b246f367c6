"""Gradients of three and four ranks: a float32 sum in the order of the ranks, in whatever bucket; numpy adds up beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.soak.tiny import digest_of
from fasttricks.learning.placement import wrap
from fasttricks.system.distributed import World, join_world
from fasttricks.system.rank_order import average_in_rank_order
from lib.forked import on_ranks
from lib.tiny import configure

LENGTHS = (1, 2, 270_001, 5, 230_003, 300_000, 310_007)
CASES = {
    "fp32": (torch.float32, False),
    "fp16, accumulated": (torch.float16, True),
    "bf16": (torch.bfloat16, False),
}
"""(dtype, whether in two micro-batches); a graph that is not accumulated is static."""
CAPS_MB = (1, 25)
STEPS = 3  # the first, at least, has one bucket whatever the cap
LARGE = {torch.float32: 3e38, torch.float16: 6e4, torch.bfloat16: 3e38}
"""Of which a sum that is divided last would overflow."""


class Given(nn.Module):
    """Parameters whose gradients are what forward() was given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(length, dtype=dtype) for length in LENGTHS)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


@cache
def drawn(rank: int, step: int, part: int, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of a micro-batch: of many sizes, some near the dtype's largest, the same whoever asks."""
    draws = np.random.default_rng([rank, step, part])
    values = [np.ldexp(draws.standard_normal(n, np.float32), draws.integers(-8, 8, n)) for n in LENGTHS]
    values[-1][:100] = draws.uniform(0.8, 1, 100) * LARGE[dtype] / 2  # of two micro-batches
    return [torch.from_numpy(v).to(dtype) for v in values]


def reduced(world: World, dtype: torch.dtype, *, cap_mb: int, accumulate: bool) -> tuple[list[str], int]:
    """A digest of the gradients after each step, and how many buckets were sent."""
    options = {"bucket_cap_mb": cap_mb, "gradient_as_bucket_view": True, "static_graph": not accumulate}
    model = DistributedDataParallel(Given(dtype), **options)
    average_in_rank_order(model, world)
    found = []
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as send:
        for step in range(STEPS):
            model.zero_grad()
            for part in range(1 + accumulate):
                with model.no_sync() if part < accumulate else nullcontext():
                    model(drawn(world.rank, step, part, dtype)).backward()
            found.append(digest_of([w.grad for w in model.module.weights]))
    return found, send.call_count


def buckets_of_wrap(world: World, deterministic: str) -> int:
    """How many buckets go another way than the backend's all-reduce in a step of what placement.wrap() makes."""
    config = configure(Path(), Path(), deterministic=deterministic)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as send:
        model = wrap(nn.Linear(3, 2), config, world, print)
        model(torch.ones(1, 3)).sum().backward()
    return send.call_count


def work(folder: Path) -> None:
    """What a rank is left with, into a file."""
    with join_world("cpu") as world:
        means = {
            (name, cap_mb): reduced(world, dtype, cap_mb=cap_mb, accumulate=accumulate)
            for name, (dtype, accumulate) in CASES.items()
            for cap_mb in CAPS_MB
        }
        own = drawn(world.rank, 0, 0, torch.float32)[2]
        sums = [world.sum_(own.to(dtype)) for dtype in (torch.float64, torch.int64)]
        wrapped = {word: buckets_of_wrap(world, word) for word in ("on", "off")}
        torch.save({"means": means, "sums": sums, "wrapped": wrapped}, folder / f"{world.rank}.pt")


def by_hand(ranks: Sequence[int], step: int, dtype: torch.dtype, *, accumulate: bool) -> list[np.ndarray]:
    """The means in numpy's float32, one rank after another as `ranks` lists them."""
    sums = [np.float32(0)] * len(LENGTHS)
    for rank in ranks:
        parts = [drawn(rank, step, part, dtype) for part in range(1 + accumulate)]
        own = [sum(micro_batches[1:], micro_batches[0]).float().numpy() for micro_batches in zip(*parts, strict=True)]
        sums = [s + o / np.float32(len(ranks)) for s, o in zip(sums, own, strict=True)]
    return sums


@pytest.fixture(scope="module", params=[3, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("rank-order")
    on_ranks(request.param, work, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_means_are_numpys_in_the_ranks_order_in_any_bucket(ranks: list[dict], case: str) -> None:
    dtype, accumulate = CASES[case]
    small, large = (ranks[0]["means"][case, cap_mb][1] for cap_mb in CAPS_MB)
    assert small > large, "the smaller cap shall have made more buckets"
    for step in range(STEPS):
        means = by_hand(range(len(ranks)), step, dtype, accumulate=accumulate)
        wanted = [torch.from_numpy(mean).to(dtype) for mean in means]
        assert all(mean.isfinite().all() for mean in wanted)
        for rank in ranks:
            for cap_mb in CAPS_MB:
                assert rank["means"][case, cap_mb][0][step] == digest_of(wanted), (step, cap_mb)


def test_another_order_would_have_other_bits(ranks: list[dict]) -> None:
    order = range(len(ranks))
    there, back = (by_hand(ranks, 0, torch.float32, accumulate=False)[-1] for ranks in (order, order[::-1]))
    assert (there != back).mean() > 0.01


def test_a_world_sums_floats_in_the_ranks_order_and_integers(ranks: list[dict]) -> None:
    own = [drawn(rank, 0, 0, torch.float32)[2] for rank in range(len(ranks))]
    wanted = [sum(t.to(dtype).numpy() for t in own) for dtype in (torch.float64, torch.int64)]
    for rank in ranks:
        assert all((found.numpy() == sums).all() for found, sums in zip(rank["sums"], wanted, strict=True))


def test_deterministic_off_keeps_the_backends_all_reduce(ranks: list[dict]) -> None:
    assert [rank["wrapped"] for rank in ranks] == [{"on": 1, "off": 0}] * len(ranks)
