"""Several ranks on CPUs through gloo: one model, one writer, one message where something is wrong."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fasttricks import trainer
from fasttricks.commands import train
from fasttricks.commands.evaluate import EvaluateConfig, evaluate_checkpoint
from fasttricks.config import ConfigError
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import find_dataset
from fasttricks.learning.numbers import draw_lam
from fasttricks.learning.schedule import learning_rate
from fasttricks.runs.saved import read_saved
from fasttricks.system.distributed import World
from fasttricks.training.build import build
from fasttricks.training.run import Run
from lib.forked import on_ranks
from lib.tiny import ALONE, arguments, configure, torchrun, write_images

TRICKS = shlex.split("--global-batch-size 20 --loss.mixup-alpha 0.2 --seed 1")
"""With seed 0 a value before a ReLU is 0 within rounding: two ways that round alike to 1e-7 then part by 1e-4 in six steps. Of 16
other networks one did so with torch's batch norm, none with ours."""


def witnessed(folder: Path, *args: str) -> None:
    """The command of a user, and after it what its rank was left with."""

    def witness(run: Run) -> dict[str, Any]:
        summary = fit(run)
        assert run.average is not None
        left = {"model": run.model, "average": run.average.model, "optimizer": run.optimizer}
        more = {"summary": summary, "sizes": [len(batch) for batch in run.train_loader]}
        states = {name: part.state_dict() for name, part in left.items()}
        torch.save(states | more, folder / f"rank-{run.world.rank}.pt")
        return summary

    fit, trainer.fit = trainer.fit, witness
    train.main(args)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks of 41 images, 20 and 21 a rank, in batches of 10: the third step has no image, and one image."""
    folder = tmp_path_factory.mktemp("ranks")
    data = write_images(folder / "data", train=41, val=5)
    args = arguments(data, folder / "run", *TRICKS, "--accumulate", "1")
    said = on_ranks(2, witnessed, folder, *args)
    assert not any("Warning" in errors for _, errors in said), said
    (folder / "stdout").write_text("".join(output for output, _ in said))
    return folder


def test_the_ranks_end_with_one_model(two_ranks: Path) -> None:
    first, second = (torch.load(two_ranks / f"rank-{rank}.pt") for rank in (0, 1))
    assert (first["sizes"], second["sizes"]) == ([10, 10, 0], [10, 10, 1]), "one rank shall have had an empty batch"
    for part in ("model", "average"):
        for name, value in first[part].items():
            if name.endswith("num_batches_tracked"):  # counts the batches of its own rank; nothing reads it
                continue
            assert torch.equal(value, second[part][name]), (part, name)
            assert value.isfinite().all(), (part, name)
    for index, state in first["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], second["optimizer"]["state"][index]["momentum_buffer"])
    assert first["summary"] | {"train_seconds": 0, "images_per_sec": 0} == second["summary"] | {
        "train_seconds": 0,
        "images_per_sec": 0,
    }


def test_the_ranks_end_where_plain_sgd_on_all_their_images_does(two_ranks: Path, tmp_path: Path) -> None:
    """In one process, with torch's own loss and unfused SGD: two networks of equal weights, batch norm local to each."""
    config = configure(two_ranks / "data", tmp_path / "plain", *TRICKS)
    run = build(config, ALONE)
    run.log.close()
    replicas = [run.model, copy.deepcopy(run.model)]
    images, _ = find_dataset(config.data)
    options = {"training": True, "batch_size": 10, "seed": config.seed, "world_size": 2, "device": ALONE.device}
    loaders = [Loader(images, config.data, rank=rank, **options) for rank in (0, 1)]
    weights = list(run.model.parameters())
    decays = [{"params": [p for p in weights if p.dim() > 1], "weight_decay": config.optim.weight_decay}]
    rest = [{"params": [p for p in weights if p.dim() <= 1]}]
    sgd = torch.optim.SGD(decays + rest, momentum=config.optim.momentum, nesterov=True, foreach=False, fused=False)
    step = 0
    for _ in range(config.epochs):
        for batches in zip(*loaders, strict=True):
            count = sum(map(len, batches))
            for rank, (replica, batch) in enumerate(zip(replicas, batches, strict=True)):
                replica.zero_grad()
                if len(batch):
                    pixels, labels = batch.images, batch.labels
                    lam = draw_lam(0.2, seed=config.seed, step=step, rank=rank)
                    (dense_loss(replica(lam * pixels + (1 - lam) * pixels.flip(0)), labels, lam) / count).backward()
            for first, second in zip(*(replica.parameters() for replica in replicas), strict=True):
                gradients = [p.grad for p in (first, second) if p.grad is not None]
                first.grad = torch.stack(gradients).sum(0)
            for group in sgd.param_groups:
                group["lr"] = learning_rate(
                    step, config.schedule, peak_lr=config.peak_lr, steps_per_epoch=3, epochs=config.epochs
                )
            sgd.step()
            for first, second in zip(*(replica.parameters() for replica in replicas), strict=True):
                second.data.copy_(first.data)
            step += 1
    trained = torch.load(two_ranks / "rank-0.pt")["model"]
    for name, value in run.model.named_parameters():
        room = 1e-6 + 2e-5 * float(
            value.detach().abs().max()
        )  # the least of a tensor hold the roundings of its largest
        torch.testing.assert_close(trained[name], value.data, rtol=0, atol=room, msg=lambda m, n=name: f"{n}: {m}")


def dense_loss(logits: torch.Tensor, labels: torch.Tensor, lam: float) -> torch.Tensor:
    """Summed cross-entropy against dense targets: 0.1 over the other classes, mixed with the reversed batch."""
    dense = torch.full_like(logits, 0.1 / (logits.shape[1] - 1)).scatter(1, labels[:, None], 0.9)
    return nn.functional.cross_entropy(logits, lam * dense + (1 - lam) * dense.flip(0), reduction="sum")


def test_rank_0_alone_prints_and_writes(two_ranks: Path) -> None:
    output = (two_ranks / "stdout").read_text()
    assert output.count("\ntop-1 ") == 1
    assert output.count("recipe   cifar10") == 1
    assert "20 = 2 rank(s) x 1 micro-batch(es) x 10 images; 3 steps an epoch" in output
    assert len(list((two_ranks / "run").glob("events.*"))) == 1
    lines = [json.loads(line) for line in (two_ranks / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_run_measured_what_its_checkpoint_gives_on_one_rank(two_ranks: Path) -> None:
    summary = json.loads((two_ranks / "run" / "summary.json").read_text())
    saved, config = read_saved(two_ranks / "run"), configure(two_ranks / "data", two_ranks / "run")
    alone = evaluate_checkpoint(EvaluateConfig(data=config.data, eval=config.eval), saved, ALONE)
    assert alone["val_images"] == summary["val_images"] == 5
    assert (alone["top1"], alone["top2"]) == (summary["top1"], summary["top2"])
    assert alone["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


def test_a_wrong_argument_is_answered_once(tiny_data: Path, tmp_path: Path) -> None:
    done = torchrun(2, "fasttricks.train", *arguments(tiny_data, tmp_path / "run", "--modle.width", "0.5"))
    assert done.returncode != 0
    assert "did you mean --model.width?" in printed_once(done.stderr)
    assert not (tmp_path / "run").exists()


def printed_once(stderr: str) -> str:
    """The error that the ranks printed, which is one line, comes first and is repeated as the last line of torchrun's report."""
    (error,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert stderr.startswith(error)
    assert stderr.strip("=\n").endswith(error)
    return error


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(tiny_data: Path, tmp_path: Path) -> None:
    done = torchrun(2, "fasttricks.train", *arguments(tiny_data, tmp_path / "run", "--global-batch-size", "15"))
    assert done.returncode != 0
    error = printed_once(done.stderr)
    assert "global_batch_size = 15: must be a multiple of ranks x accumulate (2 x 1); the nearest is 16" in error
    ours = [line for line in done.stderr.splitlines() if "fasttricks/" in line]
    assert not ours, "a traceback through our files"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_rank_is_not_lost(two_ranks: Path, tmp_path: Path) -> None:
    """A damaged image that only the second rank reads."""
    data = write_images(tmp_path / "data", train=40, val=4)
    for path in sorted((data / "val").rglob("*.jpg"))[2:]:  # the second half is the second rank's
        path.write_bytes(path.read_bytes()[:200])
    done = torchrun(2, "fasttricks.train", *arguments(data, tmp_path / "run"))
    assert done.returncode != 0
    assert "error: " in done.stderr
    assert re.search(r"[12] of 4 images are bad, over data\.max_bad = 0\.05", done.stderr)
    assert "SIGSEGV" not in done.stderr


def world(rank: int, size: int) -> World:
    return World(rank=rank, size=size, local_rank=rank, local_size=size, device=torch.device("cpu"))


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"= 16: must be a multiple of ranks x accumulate \(3 x 1\); the nearest is 15"
    ):
        build(configure(tiny_data, tmp_path / "run"), world(2, 3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_leaves_batch_norm_as_it_was(training: bool) -> None:
    """What trainer.train_step relies on, of torch itself: no NaN, statistics untouched, gradients zero and not absent."""
    norm = nn.BatchNorm2d(4).train(training)
    with torch.no_grad():
        norm.running_mean.fill_(3.0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    layers(torch.empty(0, 3, 8, 8).contiguous(memory_format=torch.channels_last)).sum().backward()
    assert norm.running_mean.tolist() == [3.0] * 4
    assert norm.running_var.tolist() == [1.0] * 4
    for parameter in layers.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
