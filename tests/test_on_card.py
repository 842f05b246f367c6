"""Saving, resume and evaluation with the run's state on a card and the rest on the host, without a GPU.

Values that come from other ranks or from a file are on the host; a run's own are on its device. On a CPU both are the same place,
so that a mixture shows on a GPU alone. lib/card.py stands in for one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fasttricks.commands import predict as predicting
from fasttricks.commands.evaluate import EvaluateConfig, evaluate_checkpoint
from fasttricks.commands.predict import PredictConfig, predict
from fasttricks.config import DistillConfig
from fasttricks.data.batch import Batch
from fasttricks.learning.divergence import first_not_finite
from fasttricks.learning.optim import group_lrs, set_lr
from fasttricks.learning.precision import image_dtype
from fasttricks.learning.teacher import load_teacher
from fasttricks.learning.teacher_cache import CachedTeacher
from fasttricks.runs.checkpoint import KEYS, load_checkpoint
from fasttricks.runs.saved import Saved, read_saved
from fasttricks.system.distributed import World
from fasttricks.system.signals import StopRequest
from fasttricks.tasks.classification import Classification
from fasttricks.trainer import report, share_statistics, validate
from fasttricks.training import build as building
from fasttricks.training.build import build
from fasttricks.training.run import Run, save
from fasttricks.training.summary import summarize
from lib.card import CARD, OnCard, card
from lib.runs import let_go
from lib.states import same
from lib.tiny import ALONE, configure

TWO = World(rank=0, size=2, local_rank=0, local_size=2, device=CARD)
"""Rank 0 of two; the other has the same values."""
FOUR_IMAGES = 4


def images_on_card(dtype: torch.dtype) -> Iterator[Batch]:
    """Validation as a loader on a GPU gives it: images and labels on the card."""
    for seed in range(2):
        draws = torch.Generator().manual_seed(seed)
        images = torch.randn(FOUR_IMAGES, 3, 32, 32, generator=draws).to(CARD, dtype)
        yield Batch(images.contiguous(memory_format=torch.channels_last), torch.tensor([0, 1, 2, 0], device=CARD))


def collectives(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """torch's, of `size` ranks that all have the values of this one. Objects arrive on the host, tensors on the card."""

    def all_gather(parts: list[Tensor], values: Tensor) -> None:
        assert values.is_contiguous() and values.is_cuda, "as nccl demands"
        for part in parts:
            part.copy_(values)

    def all_reduce(values: Tensor) -> None:
        assert values.is_contiguous() and values.is_cuda, "as nccl demands"
        values.mul_(size)

    def all_gather_object(values: list[bytes], value: bytes) -> None:
        values[:] = [value] * size

    for function in (all_gather, all_reduce, all_gather_object):
        monkeypatch.setattr(dist, function.__name__, function)
    monkeypatch.setattr(dist, "gather_object", lambda value, values: all_gather_object(values, value))
    monkeypatch.setattr(dist, "barrier", lambda: None)


@pytest.fixture
def on_card(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """on_card(precision) is rank 0 of two, built on the card. Its loaders are the CPU's, and only their counts are used."""
    make_loaders = building.make_loaders

    def on_the_cpu(*args: Any) -> Any:
        return make_loaders(*args[:-1], dataclasses.replace(args[-1], device=ALONE.device))

    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)
    monkeypatch.setattr(building, "make_loaders", on_the_cpu)
    monkeypatch.setattr(building, "wrap", lambda model, *_: model)
    collectives(monkeypatch, TWO.size)
    runs: list[Run] = []

    def make(precision: str, *more: str) -> Run:
        let_go(runs)
        options = [
            "--precision",
            precision,
            "--global-batch-size",
            "16",
            "--ema-decay",
            "0.9",
            "--device",
            "cuda",
            *more,
        ]
        runs.append(build(configure(tiny_data, tmp_path / "run", *options), TWO, StopRequest(ALONE)))
        return runs[-1]

    with card():
        yield make
        for run in runs:
            run.log.close(draw=False)


def step(run: Run) -> None:
    """A step without a backward pass: gradients of one, a loss for the log and the guard, and the average."""
    set_lr(run.optimizer, group_lrs(run.optimizer, 0.1))
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss, counted = run.guard.judge(torch.tensor(8.0, device=CARD), 8, run.step)
    assert isinstance(loss, OnCard)
    run.log_loss(*counted)
    run.loss_scale.step(run.optimizer, check=run.guard.skip)
    run.optimizer.zero_grad()
    assert run.average is not None
    run.average.update()
    run.step += 1
    run.log.stepped()


def on_host(state: Any) -> Any:
    """The nest `state`, its tensors read from the card."""
    if isinstance(state, dict):
        return {name: on_host(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(on_host, state))
    return state.host.clone() if isinstance(state, OnCard) else state


FP32 = pytest.param("fp32", marks=pytest.mark.slow)
BF16 = pytest.param("bf16", marks=pytest.mark.slow)
PRECISIONS = pytest.mark.parametrize("precision", [FP32, BF16, "fp16"])
"""That of a run on a GPU, and the others among the slow tests."""


@PRECISIONS
def test_a_run_is_saved_within_an_epoch_resumed_and_measured(
    precision: str, on_card: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In trainer.train()'s order, but for the passes. In mid-epoch other ranks' statistics are saved with the run's state."""
    run = on_card(precision, "--on-bad-loss", "skip")
    run.log.start(run.step)
    step(run)
    assert run.step_in_epoch == 1
    save(run)
    state = load_checkpoint(run.folder)
    statistics = on_host(dict(run.model.named_buffers()))
    assert statistics and [same(rank["buffers"], statistics) for rank in state["ranks"]] == [True, True]
    assert same(plain(run.state_dict()), plain(state))
    run.log.close(draw=False)

    resumed = on_card(precision, "--on-bad-loss", "skip", "--resume")
    assert same(plain(resumed.state_dict()), plain(state))
    assert all(isinstance(tensor, OnCard) for tensor in own_tensors(resumed))

    resumed.log.start(resumed.step)
    while resumed.step < resumed.steps_per_epoch:
        step(resumed)
    statistics = on_host(dict(resumed.model.named_buffers()))
    resumed.train_seconds += report(resumed)
    share_statistics(resumed)
    assert same(on_host(dict(resumed.model.named_buffers())), statistics), "the mean over ranks that are alike"
    resumed.epoch, resumed.unmeasured = 1, True
    monkeypatch.setattr(type(resumed.val_loader), "__iter__", lambda _: images_on_card(torch.float32))
    metrics = validate(resumed)
    assert metrics["val_images"] == 2 * 2 * FOUR_IMAGES
    save(resumed)
    assert summarize(resumed, metrics)["device"] == "a card"
    records = [json.loads(line) for line in (resumed.folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["val_loss"] == metrics["val_loss"]
    assert load_checkpoint(resumed.folder)["ranks"][0]["buffers"] == {}


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state that all ranks share, on the host, without what a resumed run need not have."""
    return {name: on_host(state[name]) for name in KEYS if name not in ("config", "ranks", "train_seconds")}


def own_tensors(run: Run) -> Iterator[Tensor]:
    """The tensors that a run changes, wherever they came from."""
    assert run.average is not None
    yield from run.model.state_dict().values()
    yield from run.average.model.state_dict().values()
    for each in run.optimizer.state.values():
        assert {value.dtype for value in each.values()} == {torch.float32}
        yield from each.values()
    values = [*vars(run.loss_scale).values(), *vars(run.guard).values(), *vars(run.log).values()]
    yield from (value for value in values if isinstance(value, Tensor))


def test_a_tensor_that_is_not_finite_is_named_on_each_device() -> None:
    """Of the card, or of the host; not in the same list either way."""
    with card():
        for bad in ("own", "theirs"):
            state = {"own": torch.ones(3, device=CARD), "ranks": [{"theirs": torch.ones(2)}]}
            assert first_not_finite(state) is None
            (state["own"] if bad == "own" else state["ranks"][0]["theirs"])[1] = float("inf")  # type: ignore[index]
            assert first_not_finite(state) == {"own": "own", "theirs": "ranks.0.theirs"}[bad]


# -------------------------------------------------------------------------------------- a checkpoint's network
def evaluated(saved: Saved, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the same network on the CPU: the numbers are, where both compute in float32."""

    def batches(_: Classification, *__: Any, dtype: torch.dtype, **___: Any) -> Iterator[Batch]:
        for batch in images_on_card(dtype):
            yield batch if here else Batch(batch.images.cpu(), batch.labels.cpu())

    monkeypatch.setattr(Classification, "val_batches", batches)
    found = []
    for here in (True, False):
        world = dataclasses.replace(ALONE, device=CARD) if here else ALONE
        config = EvaluateConfig(precision=precision if here else "fp32", data=saved.config.data)  # type: ignore[arg-type]
        found.append(evaluate_checkpoint(config, saved, world))
    assert found[0]["val_images"] == 2 * FOUR_IMAGES
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], rel=0 if precision == "fp32" else 0.02)


def predicted(saved: Saved, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[predicting.Part]:
        batch = next(images_on_card(image_dtype(config.precision, CARD)))
        yield predicting.Part(range(2), [0, 1], batch.images[:2], {})

    monkeypatch.setattr(predicting, "load", load)
    config = PredictConfig(precision=precision, data=saved.config.data, flip=True, embed=True)  # type: ignore[arg-type]
    found = list(predict(saved, ["a.jpg", "b.jpg"], config, dataclasses.replace(ALONE, device=CARD)))
    assert [prediction.path for prediction in found] == ["a.jpg", "b.jpg"]
    for prediction in found:
        assert sum(share for _, share in prediction.classes) == pytest.approx(1)
        assert prediction.embedding is not None and prediction.embedding.dtype == np.float32


def taught(saved: Saved, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of other class order; without a cache and with one, which is filled and then read."""
    folder = saved.path.parent.parent
    teacher = load_teacher(
        DistillConfig(teacher=str(folder)),
        saved.classes[::-1],
        saved.config.data,
        dataclasses.replace(ALONE, device=CARD),
    )
    cached = CachedTeacher(teacher, tmp_path / "cache", num_images=FOUR_IMAGES, num_classes=3)
    batch = next(images_on_card(image_dtype(precision, CARD)))  # type: ignore[arg-type]
    batch = dataclasses.replace(batch, places=torch.arange(4).numpy(), shown=torch.arange(4).numpy())
    alone = teacher.judge(batch, batch.images)
    for _ in range(2):
        judged = cached.judge(batch, batch.images)
        assert isinstance(judged, OnCard) and torch.equal(judged, alone)
    assert cached.asked == 1


@PRECISIONS
@pytest.mark.parametrize("use", [evaluated, predicted, taught])
def test_a_checkpoints_network_on_the_card(
    use: Callable[..., None], precision: str, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = read_saved(teacher_run)
    with card():
        use(saved, precision, tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------- the card that is not there
@pytest.mark.parametrize(
    ("operator", "refused"),
    [
        (lambda card, host: card + host, True),
        (lambda card, host: torch.stack([card, host]), True),
        (lambda card, host: torch.cat([card, host]), True),
        (lambda card, host: torch.stack(torch._foreach_norm([card, host])), True),
        (lambda card, host: host.add_(card), True),
        (lambda card, host: torch.where(host > 0, card, card), True),
        (lambda card, host: card + host.sum(), False),
        (lambda card, host: card.copy_(host), False),
        (lambda card, host: host + card.cpu(), False),
        (lambda card, host: torch._foreach_norm([card, host]), False),
    ],
)
def test_the_stand_in_refuses_what_torch_refuses(operator: Callable[..., object], refused: bool) -> None:
    with card():
        tensors = torch.ones(3, device=CARD), torch.ones(3)
        if refused:
            with pytest.raises(RuntimeError, match="on the same device"):
                operator(*tensors)
        else:
            operator(*tensors)
