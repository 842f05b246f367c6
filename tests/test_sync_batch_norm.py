"""--sync-batch-norm on CPUs: a run of several ranks ends where plain SGD does, whose batch norm sees the images of all ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasttricks import trainer
from fasttricks.commands import train
from fasttricks.config import ConfigError
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import find_dataset
from fasttricks.learning.placement import synchronize_batch_norm
from fasttricks.learning.schedule import learning_rate
from fasttricks.models.norm import SyncBatchNormAct
from fasttricks.training.build import build
from fasttricks.training.run import Run
from lib.forked import on_ranks
from lib.tiny import ALONE, arguments, configure, write_images


def witnessed(folder: Path, *args: str) -> None:
    """The command of a user; each rank keeps what its network was left with, and how many images it had at each step."""

    def witness(run: Run) -> dict[str, Any]:
        summary = fit(run)
        sizes = [len(batch) for batch in run.train_loader]
        torch.save({"model": run.model.state_dict(), "sizes": sizes}, folder / f"rank-{run.world.rank}.pt")
        return summary

    fit, trainer.fit = trainer.fit, witness
    train.main(args)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_ranks_end_where_plain_sgd_on_all_their_images_does(ranks: int, tmp_path: Path) -> None:
    """In one process, by torch's batch norm in float64. At the last step of an epoch but one rank has no image."""
    batch = 10 * ranks
    data, more = write_images(tmp_path / "data", train=2 * batch + 1, val=5), ["--global-batch-size", str(batch)]
    more += ["--loss.mixup-alpha", "0", "--accumulate", "1", "--model.norm", "torch"]
    on_ranks(ranks, witnessed, tmp_path, *arguments(data, tmp_path / "run", *more, "--sync-batch-norm"))
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(ranks)]
    assert 0 in {one["sizes"][-1] for one in found} and sum(one["sizes"][-1] for one in found) == 1
    for one in found[1:]:
        assert all(torch.equal(one["model"][name], value) for name, value in found[0]["model"].items())

    config = configure(data, tmp_path / "plain", *more)
    run = build(config, ALONE)
    run.log.close()
    run.model.double()
    images, _ = find_dataset(config.data)
    options = {"training": True, "batch_size": 10, "seed": config.seed, "world_size": ranks, "device": ALONE.device}
    loaders = [Loader(images, config.data, rank=rank, **options) for rank in range(ranks)]
    weights = list(run.model.parameters())
    decays = [{"params": [p for p in weights if p.dim() > 1], "weight_decay": config.optim.weight_decay}]
    rest = [{"params": [p for p in weights if p.dim() <= 1]}]
    sgd = torch.optim.SGD(decays + rest, momentum=config.optim.momentum, nesterov=True, foreach=False, fused=False)
    step = 0
    for _ in range(config.epochs):
        for batches in zip(*loaders, strict=True):
            pixels, labels = (
                torch.cat([getattr(batch, name) for batch in batches if len(batch)]) for name in ("images", "labels")
            )
            run.model.zero_grad()
            logits = run.model(pixels.double())
            dense = torch.full_like(logits, 0.1 / (logits.shape[1] - 1)).scatter(1, labels[:, None], 0.9)
            F.cross_entropy(logits, dense).backward()
            for group in sgd.param_groups:
                group["lr"] = learning_rate(
                    step, config.schedule, peak_lr=config.peak_lr, steps_per_epoch=3, epochs=config.epochs
                )
            sgd.step()
            step += 1
    for name, value in run.model.state_dict().items():
        room = 2e-6 + 2e-5 * float(
            value.detach().abs().max()
        )  # the least of a tensor hold the roundings of its largest
        torch.testing.assert_close(
            found[0]["model"][name].to(value.dtype), value, rtol=0, atol=room, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_with_compile_it_needs_a_gpu() -> None:
    model, world = nn.Sequential(nn.BatchNorm2d(3)), dataclasses.replace(ALONE, size=2)
    with pytest.raises(ConfigError, match=r"sync_batch_norm.*needs CUDA with --compile, .*; --compile off on CPUs"):
        synchronize_batch_norm(model, world, "default")
    assert isinstance(synchronize_batch_norm(model, world, "off")[0], SyncBatchNormAct)
