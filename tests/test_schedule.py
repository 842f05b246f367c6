"""The learning rate of every step against torch's and timm's schedulers, and against the paper's own words."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    PolynomialLR,
    SequentialLR,
)

from fasttricks.config import ScheduleConfig
from fasttricks.learning.schedule import cosine, learning_rate, poly, step_decay, warmup

PEAK = 0.4


def ours(config: ScheduleConfig, steps_per_epoch: int, epochs: int) -> list[float]:
    steps = range(steps_per_epoch * epochs)
    return [learning_rate(s, config, peak_lr=PEAK, steps_per_epoch=steps_per_epoch, epochs=epochs) for s in steps]


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, dtype=torch.float64, requires_grad=True)], lr=PEAK)


def rates(scheduler: LRScheduler, count: int) -> list[float]:
    """The rates at which `count` updates of the scheduler's optimizer run."""
    found = []
    for _ in range(count):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def torch_warmup(optimizer: torch.optim.SGD, num_warmup: int) -> LRScheduler:
    """Batch i of m, counted from 1, at i / m: torch's line from 1 / m at its first step to 1 at its m-th."""
    return LinearLR(optimizer, start_factor=1 / num_warmup, end_factor=1.0, total_iters=num_warmup - 1)


@pytest.mark.parametrize(("steps_per_epoch", "epochs", "warmup_epochs"), [(10, 12, 5), (7, 9, 1), (100, 3, 0.25)])
def test_warmup_and_cosine_are_torchs(steps_per_epoch: int, epochs: int, warmup_epochs: float) -> None:
    num_steps, num_warmup = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    sgd = optimizer()
    parts = [torch_warmup(sgd, num_warmup), CosineAnnealingLR(sgd, T_max=num_steps - num_warmup)]
    want = rates(SequentialLR(sgd, parts, milestones=[num_warmup]), num_steps)
    config = ScheduleConfig(decay="cosine", warmup_epochs=warmup_epochs)
    assert ours(config, steps_per_epoch, epochs) == pytest.approx(want, rel=1e-10, abs=1e-14)


def test_cosine_is_timms() -> None:
    from timm.scheduler.cosine_lr import CosineLRScheduler

    sgd = optimizer()
    timms = CosineLRScheduler(sgd, t_initial=110, lr_min=0.0, t_in_epochs=False)
    got = ours(ScheduleConfig(decay="cosine", warmup_epochs=0), 11, 10)
    for step, lr in enumerate(got):
        timms.step_update(step)
        assert lr == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-12)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7])
def test_steps_at_30_60_90_are_torchs(steps_per_epoch: int) -> None:
    want = rates(MultiStepLR(optimizer(), [e * steps_per_epoch for e in (30, 60, 90)], 0.1), 120 * steps_per_epoch)
    got = ours(ScheduleConfig(decay="step", warmup_epochs=0), steps_per_epoch, 120)
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
@pytest.mark.parametrize(("steps_per_epoch", "epochs", "warmup_epochs"), [(10, 12, 5), (7, 9, 0)])
def test_a_power_of_the_steps_left_is_torchs(
    steps_per_epoch: int, epochs: int, warmup_epochs: float, power: float
) -> None:
    num_steps, num_warmup = epochs * steps_per_epoch, round(warmup_epochs * steps_per_epoch)
    decayed = rates(PolynomialLR(optimizer(), total_iters=num_steps - num_warmup, power=power), num_steps - num_warmup)
    risen = rates(torch_warmup(optimizer(), num_warmup), num_warmup) if num_warmup else []
    config = ScheduleConfig(decay="poly", warmup_epochs=warmup_epochs, poly_power=power)
    assert ours(config, steps_per_epoch, epochs) == pytest.approx(risen + decayed, rel=1e-9)


def test_step_epochs_count_from_the_start_of_the_run() -> None:
    """With 5 epochs of warm-up the first step is still at epoch 30, as in resnet50-efficient."""
    got = ours(ScheduleConfig(decay="step", warmup_epochs=5), 4, 120)
    want = rates(torch_warmup(optimizer(), 20), 20) + rates(
        LambdaLR(optimizer(), lambda s: 0.1 ** sum(s + 20 >= e * 4 for e in (30, 60, 90))), 460
    )
    assert got == pytest.approx(want, rel=1e-12)
    assert [got[119], got[120], got[240], got[360]] == pytest.approx([PEAK, PEAK / 10, PEAK / 100, PEAK / 1000])


def test_the_papers_first_and_last_rates() -> None:
    """resnet50d-tricks on ImageNet: 1,281,167 images in batches of 1024, 200 epochs, 5 of them warm-up, peak 0.4."""
    steps_per_epoch, epochs = math.ceil(1_281_167 / 1024), 200
    num_warmup, num_steps = 5 * steps_per_epoch, epochs * steps_per_epoch

    def lr(step: int) -> float:
        return learning_rate(step, ScheduleConfig(), peak_lr=PEAK, steps_per_epoch=steps_per_epoch, epochs=epochs)

    assert lr(0) == pytest.approx(0.4 / num_warmup)  # i = 1 of m
    assert lr(num_warmup - 1) == lr(num_warmup) == PEAK  # i = m, then t = 0
    middle = num_warmup + (num_steps - num_warmup) // 2
    assert lr(middle) == pytest.approx(PEAK / 2, rel=1e-4)
    last = (math.pi / 2 / (num_steps - num_warmup)) ** 2 * PEAK  # 1 + cos(pi - x) = x^2 / 2
    assert lr(num_steps - 1) == pytest.approx(last, rel=1e-6)
    assert lr(num_steps - 1) > 0


def test_fractional_warmup_rounds_to_whole_batches() -> None:
    got = ours(ScheduleConfig(warmup_epochs=0.26), 10, 2)
    assert got[:4] == pytest.approx([PEAK / 3, 2 * PEAK / 3, PEAK, PEAK])


@pytest.mark.parametrize("decay", ["cosine", "step", "poly"])
@pytest.mark.parametrize(("steps_per_epoch", "epochs", "warmup_epochs"), [(1, 1, 0.9), (1, 2, 1.9), (3, 1, 0.99)])
def test_runs_of_a_few_steps_have_a_rate_above_0(
    decay: str, steps_per_epoch: int, epochs: int, warmup_epochs: float
) -> None:
    config = ScheduleConfig(decay=decay, warmup_epochs=warmup_epochs)  # type: ignore[arg-type]
    got = ours(config, steps_per_epoch, epochs)
    assert all(0 < lr <= PEAK for lr in got)
    assert got[-1] == PEAK


def test_the_parts_alone() -> None:
    assert [warmup(i, 4) for i in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [cosine(t, 2) for t in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert [step_decay(e, (30, 60), 0.5) for e in (0, 29.99, 30, 59.9, 60, 1000)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert step_decay(10, (), 0.1) == 1
    assert [poly(t, 4, 2.0) for t in range(5)] == [1.0, 0.5625, 0.25, 0.0625, 0.0]
