"""Ranks against one process, fed the same tensors: the gradient is the mean over all images, however they are split.

Batch norm is in eval mode, as its statistics are each rank's own; mixup's lambda and partners are given.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fasttricks.data.batch import Batch
from fasttricks.learning.optim import master_state_dict
from fasttricks.system.distributed import World, join_world
from fasttricks.tasks import classification
from fasttricks.tasks.losses import Targets
from fasttricks.trainer import train_step
from fasttricks.training.build import build
from fasttricks_kernels import mixup
from lib.forked import on_ranks
from lib.runs import own_convolutions
from lib.tiny import configure, write_images

# Images of rank 0, of rank 1, precision. One process takes the images of both ranks.
CASES = {"equal": (8, 8, "fp32"), "unequal": (8, 5, "fp32"), "fp16": (8, 5, "fp16")}
STEPS = 20


class Given:
    """In the place of the loader."""

    def __init__(self, images_a_step: int) -> None:
        self.images_a_step = images_a_step

    def __len__(self) -> int:
        return STEPS

    def global_count(self, step: int) -> int:
        return self.images_a_step


def train(world: World, folder: Path, name: str, first: int, second: int, precision: str) -> dict[str, Any]:
    def mix(images: Tensor, labels: Tensor, lam: float) -> tuple[Tensor, Targets]:
        """With the reversed images of one rank, in one process too."""
        sizes = [first, second] if len(labels) == first + second else [len(labels)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        order = torch.cat(
            [torch.arange(start + size - 1, start - 1, -1) for start, size in zip(starts, sizes, strict=True)]
        )
        return mixup(images, order, lam), Targets(labels, labels[order], lam)

    options = [
        "--loss.mixup-alpha",
        "0.2",
        "--global-batch-size",
        str(2 * max(first, second)),
        "--precision",
        precision,
        "--model.no-zero-gamma",
        "--optim.base-lr",
        "0.5",
        "--schedule.decay",
        "step",
    ]
    run = build(configure(folder / "data", folder / f"{name}-of-{world.size}", *options), world)
    run.log.close()
    run.shards = Given(first + second)
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    run.forward.eval()
    draws = torch.Generator().manual_seed(7)
    mine = slice(None) if world.size == 1 else (slice(0, first), slice(first, None))[world.rank]
    dtype = torch.float16 if precision == "fp16" else torch.float32
    losses = []
    with (
        own_convolutions() if precision == "fp16" else nullcontext(),
        mock.patch.object(classification, "mix_batch", mix),
        mock.patch("fasttricks.learning.learner.draw_lam", lambda alpha, *, seed, step, rank: 0.3 + 0.4 * (step % 2)),
    ):
        for _ in range(STEPS):
            images = torch.randn(first + second, 3, 16, 16, generator=draws)
            labels = torch.randint(0, 3, (first + second,), generator=draws)
            own = images[mine].to(dtype).contiguous(memory_format=torch.channels_last)
            losses += [loss for loss, _ in train_step(run, [Batch(own, labels[mine])])]
    return {
        "losses": world.sum_(torch.stack(losses)) / (first + second),
        "weights": master_state_dict(run.model, run.optimizer),
        "dtypes": sorted({str(p.dtype) for p in run.model.parameters()}),
        "skipped": run.loss_scale.skipped,
    }


def work(folder: Path) -> None:
    """What a rank does: each case, and what it is left with into a file."""
    with join_world("cpu") as world:
        results = {name: train(world, folder, name, *case) for name, case in CASES.items()}
        torch.save(results, folder / f"rank-{world.rank}-of-{world.size}.pt")


Result = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result, Result]:
    """What one process was left with, and each of two ranks."""
    folder = tmp_path_factory.mktemp("parallel")
    write_images(folder / "data", train=40, val=3)
    for ranks in (1, 2):
        on_ranks(ranks, work, folder)
    names = ("rank-0-of-1", "rank-0-of-2", "rank-1-of-2")
    alone, first, second = (torch.load(folder / f"{name}.pt") for name in names)
    return alone, first, second


@pytest.mark.parametrize("case", ["equal", "unequal"])
def test_two_ranks_are_one_process_in_loss_and_weights_to_1e_6(
    case: str, results: tuple[Result, Result, Result]
) -> None:
    """Unequal: the mean over the 13 images present, which the mean of the ranks' means is not."""
    alone, *ranks = (result[case] for result in results)
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        for name, value in alone["weights"].items():
            got = rank["weights"][name]
            torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert alone["losses"][-1] != alone["losses"][0]


def test_ranks_reduce_fp16_and_fp32_gradients_and_keep_one_model(results: tuple[Result, Result, Result]) -> None:
    """FP16 gradients are summed in FP16, batch norm's in FP32, in buckets of their own; masters stay equal on the ranks."""
    alone, first, second = (result["fp16"] for result in results)
    assert first["dtypes"] == ["torch.float16", "torch.float32"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, alone["weights"][name], rtol=0, atol=5e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert first["skipped"] == second["skipped"]
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=5e-3, atol=0)
