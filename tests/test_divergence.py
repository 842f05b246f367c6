"""A loss or weight that is no use: noted without a wait, named with the last good checkpoint, or skipped on all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttricks import trainer
from fasttricks.config import ConfigError, OptimConfig
from fasttricks.learning.divergence import Counted, DivergedError, LossGuard, bad_gradients, first_not_finite
from fasttricks.learning.optim import build_optimizer
from fasttricks.learning.precision import make_loss_scale
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.stored import checkpoints
from fasttricks.tasks import classification
from fasttricks.trainer import fit, train_step
from fasttricks.training.build import build
from fasttricks.training.run import Run, save
from lib.syncs import NoHostCopy, NoHostSync
from lib.tables import covering, mostly_slow
from lib.tiny import ALONE, configure


@pytest.fixture
def start(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """start(*arguments) is a Run on the tiny data, its log closed at the end of the test."""
    runs: list[Run] = []
    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)

    def make(*more: str, **changes: Any) -> Run:
        runs.append(
            build(configure(tiny_data, changes.pop("run_dir", tmp_path / f"run-{len(runs)}"), *more, **changes), ALONE)
        )
        return runs[-1]

    yield make
    for run in runs:
        run.log.close()


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, loss: float = math.nan) -> None:
    """Give the loss of these steps (counted from 0) this value, and a gradient to match."""
    real, calls = classification.training_loss, iter(range(10**9))

    def spoiled(*args: Any) -> Tensor:
        value: Tensor = real(*args)
        return value * (loss / value.detach()) if next(calls) in steps else value

    monkeypatch.setattr(classification, "training_loss", spoiled)


# ---------------------------------------------------------------------------------------------------------- the guard
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 8 * 100.1])
def test_the_first_bad_loss_is_kept_and_counted(loss: float) -> None:
    guard = LossGuard(ALONE, limit=100.0, skip=False)
    assert guard.look() is None
    with NoHostCopy(), NoHostSync():
        for step, value in enumerate([8.0, 799.0, loss, 3.0, math.nan]):
            guard.judge(torch.tensor(value), 8, step)
    bad = guard.look()
    assert bad is not None
    assert (bad.step, bad.micro_batches) == (2, 2)
    assert bad.loss == pytest.approx(loss / 8, nan_ok=True)
    assert guard.look() is None, "each is told once"


def test_without_a_limit_any_finite_loss_is_good_and_an_empty_batch_too() -> None:
    guard = LossGuard(ALONE, limit=0.0, skip=False)
    guard.judge(torch.tensor(1e30), 4, 0)
    guard.judge(torch.tensor(0.0), 0, 1)
    assert guard.look() is None


def test_a_skipped_loss_turns_the_gradient_to_nan_and_is_not_logged() -> None:
    guard = LossGuard(ALONE, limit=10.0, skip=True)
    weight = torch.ones(3, requires_grad=True)
    for factor, bad in ((1.0, False), (100.0, True)):
        weight.grad = None
        loss, (counted, images) = guard.judge((weight * factor).sum(), 3, 0)
        loss.backward()
        assert bool(weight.grad.isnan().all()) is bad  # type: ignore[union-attr]
        assert (float(counted), int(images)) == ((0.0, 0) if bad else (3.0, 3))
    assert guard.look() is not None
    assert guard.skipped == 1


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_step_with_a_bad_gradient_changes_neither_weights_nor_momentum(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(backend=backend))  # type: ignore[arg-type]
    scale = make_loss_scale(OptimConfig(), "fp32", torch.device("cpu"))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for bad in (True, False, True, False):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if bad:
            model.weight.grad[0, 0] = math.inf  # type: ignore[index]
        before = [p.detach().clone() for p in model.parameters()]
        momentum = [s["momentum_buffer"].clone() for s in optimizer.state.values() if "momentum_buffer" in s]
        assert float(bad_gradients(optimizer)) == float(bad)
        with ExitStack() as watch:
            if backend == "fused":  # torch's own calls found_inf.to(device), which on the CPU looks like a copy to it
                watch.enter_context(NoHostCopy())
                watch.enter_context(NoHostSync())
            scale.step(optimizer, check=True)
        after = list(model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) is bad
        if bad:
            kept = [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
            assert all(
                torch.equal(a, b) for a, b in zip(momentum or [torch.zeros_like(k) for k in kept], kept, strict=True)
            )


def test_a_tensor_that_is_not_finite_is_named() -> None:
    state: dict[str, Any] = {"a": torch.ones(3), "b": [{"c": torch.ones(2)}], "n": torch.tensor(3), "e": torch.empty(0)}
    assert first_not_finite(state) is None
    state["b"][0]["c"][1] = math.nan
    assert first_not_finite(state) == "b.0.c"
    state["a"][0] = -math.inf
    assert first_not_finite(state) == "a"


# ------------------------------------------------------------------------------------------------------------ the run
@pytest.mark.parametrize(("precision", "loss"), covering(["fp32", "fp16"], [math.nan, 1e6]))
def test_a_bad_loss_stops_the_run_and_names_all(
    loss: float, precision: str, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the fifth step, the second of the second epoch; the log would be written after the sixth."""
    run = start("--precision", precision, "--optim.loss-scale", "256", "--log-steps", "3")
    spoil(monkeypatch, 4, loss=loss)
    with pytest.raises(DivergedError) as caught:
        fit(run)
    message = str(caught.value)
    scale = 256 if precision == "fp16" else 1
    value = "nan" if loss != loss else f"{1e6 / 16:g}"
    assert message.startswith(
        f"loss = {value} in step 5 at lr {run.lr_at(4):.4g}, loss scale {scale}: must be finite"
    ), message
    assert message.endswith(f"the last good checkpoint is {run.folder}/checkpoints/step-0000000003.pt")
    assert len(checkpoints(run.folder / "checkpoints")) == 1


def test_a_bad_checkpoint_never_takes_a_good_ones_place(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save is due right after the bad step, before the log would tell of it."""
    run = start("--log-steps", "100", "--checkpoint-steps", "1")
    spoil(monkeypatch, 1)
    with pytest.raises(DivergedError, match=r"in step 2 .*step-0000000001.pt"):
        fit(run)
    assert [path.name for path in checkpoints(run.folder / "checkpoints")] == ["step-0000000001.pt"]


def test_weights_that_are_not_finite_are_not_saved(start: Callable[..., Run]) -> None:
    run = start()
    with torch.no_grad():
        run.model.fc.bias[0] = math.inf  # type: ignore[union-attr, operator]
    with pytest.raises(
        DivergedError, match=r"^model.fc.bias after step 0: must be finite.*no checkpoint was saved yet$"
    ):
        save(run)
    assert not checkpoints(run.folder / "checkpoints")


@pytest.mark.parametrize(
    ("precision", "loss"),
    mostly_slow(
        [("fp32", 1e4), ("fp32", math.nan), ("bf16", math.nan), ("fp16", 1e4)], ("fp32", math.nan), ("fp16", 1e4)
    ),
)
def test_a_bad_loss_is_skipped_and_counted_where_asked(
    precision: str, loss: float, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spoiled step leaves the weights as they were; the run ends well and its log has no NaN."""
    run = start("--precision", precision, "--on-bad-loss", "skip", accumulate=2)
    step, moved = trainer.train_step, []

    def watching(run: Run, group: Any) -> list[Counted]:
        before = run.model.fc.weight.detach().clone()  # type: ignore[union-attr, operator]
        counts = step(run, group)
        moved.append(not torch.equal(before, run.model.fc.weight))  # type: ignore[union-attr, arg-type]
        return counts

    monkeypatch.setattr(trainer, "train_step", watching)
    spoil(monkeypatch, 5, loss=loss)  # the second micro-batch of the third step
    summary = fit(run)
    assert moved == [True, True, False, True, True, True] or (precision == "fp16" and not moved[2])
    assert summary["skipped_losses"] == 1
    assert math.isfinite(summary["val_loss"])
    state = load_checkpoint(run.folder)
    assert state["skipped_losses"] == 1
    resumed = start("--precision", precision, "--on-bad-loss", "skip", run_dir=run.folder, resume=True, accumulate=2)
    assert resumed.guard.skipped == 1


def test_where_every_loss_is_bad_skipping_ends_too(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttricks.learning.divergence.MOST_SKIPPED", 3)
    run = start("--on-bad-loss", "skip", "--epochs", "3")
    spoil(monkeypatch, 0, 1, 3, 4, 5, 6)  # two in a row are no reason; three are
    with pytest.raises(DivergedError, match=r"loss = nan in step 6 .* in a row: .*step-0000000003.pt"):
        fit(run)


def test_apex_cannot_skip() -> None:
    with pytest.raises(ConfigError, match="on_bad_loss = 'skip': needs an optimizer that can skip a step"):
        configure(Path("x"), Path("y"), "--on-bad-loss", "skip", optim=OptimConfig(backend="apex"))


def test_a_step_that_may_be_skipped_never_waits_either(start: Callable[..., Run]) -> None:
    run = start("--on-bad-loss", "skip", "--optim.backend", "fused")
    batch = next(iter(run.train_loader))
    with NoHostCopy(), NoHostSync():
        train_step(run, [batch])
