"""train_step() and fit(): the gradient is the mean over images, nothing waits for the device, a resumed run is the same."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttricks import trainer
from fasttricks.config import DistillConfig, EvalConfig, LossConfig
from fasttricks.config.recipes import RECIPES
from fasttricks.data.batch import Batch
from fasttricks.learning.numbers import draw_lam
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.tasks import classification
from fasttricks.tasks.losses import Targets
from fasttricks.trainer import fit, train_step
from fasttricks.training.run import Run
from lib.runs import final_state, groups, interrupt, records
from lib.states import same
from lib.syncs import NoHostCopy, NoHostSync
from lib.tiny import write_images

PLAIN = shlex.split("--data.area 1 1 --data.aspect 1 1 --data.flip 0 --data.color none --data.pca-noise 0")
TRICKS = shlex.split("--loss.mixup-alpha 0.2 --ema-decay 0.9 --data.color paper --data.pca-noise 0.1")


def weights(run: Run) -> dict[str, Tensor]:
    """A copy of the weights and statistics."""
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.fixture(scope="module")
def square_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which PLAIN takes the whole: the order is then all that is random."""
    return write_images(tmp_path_factory.mktemp("square"), train=45, val=3, sides=(48, 48))


# ------------------------------------------------------------------------------------------- gradient: mean over images
def frozen_statistics(run: Run) -> Run:
    """Batch norm in eval mode, so that an image's gradient does not depend on its neighbours; moved off the identity."""
    for module in run.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    run.model.eval()
    return run


@pytest.mark.parametrize(("accumulate", "batch"), [(1, 16), (2, 16), (4, 16), (2, 24)])
def test_an_epoch_is_plain_sgd_on_the_mean_loss(
    accumulate: int, batch: int, start: Callable[..., Run], square_data: Path
) -> None:
    """Against torch's own loss and unfused SGD on whole batches; of 45 images the last step has fewer, unequally split."""
    begin = partial(start, *PLAIN, "--model.no-zero-gamma", data_dir=square_data, global_batch_size=batch)
    reference = frozen_statistics(begin())
    plain, batches = reference.model, [Batch(b.images.clone(), b.labels.clone()) for b in reference.train_loader]
    run = frozen_statistics(begin(accumulate=accumulate))
    config = run.config.optim
    named = dict(plain.named_parameters())
    decayed = [p for name, p in named.items() if p.dim() > 1]
    rest = [p for name, p in named.items() if p.dim() <= 1]
    sgd = torch.optim.SGD(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest}],
        lr=0.1, momentum=config.momentum, nesterov=True, fused=False, foreach=False,
    )  # fmt: skip
    before = weights(run)
    for step, batch in enumerate(batches):
        for group in sgd.param_groups:
            group["lr"] = run.lr_at(step)
        sgd.zero_grad()
        paper_smoothing(plain(batch.images), batch.labels, run.config.loss.smoothing).backward()
        sgd.step()
    for group in groups(run):
        train_step(run, group)
    assert run.step == len(batches)
    after = weights(run)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float((after[n] - before[n]).abs().max()) for n in named) > 1e-3, (
        "the run hardly moved: nothing was shown"
    )


def paper_smoothing(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy against dense targets: 1 - smoothing, and smoothing / (K - 1) for each other class."""
    classes = logits.shape[1]
    dense = torch.full_like(logits, smoothing / (classes - 1)).scatter(1, labels[:, None], 1 - smoothing)
    return nn.functional.cross_entropy(logits, dense)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["resnet50-efficient", "resnet50d-tricks"])
def test_the_kernels_losses_are_torchs_over_100_steps(
    recipe: str, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each recipe's loss from our kernels, and from torch's cross-entropy with dense targets: the same to 1e-6."""
    loss_config = RECIPES[recipe]().loss
    losses: dict[str, list[float]] = {}
    for who in ("ours", "torch"):
        run = frozen_statistics(start("--optim.base-lr", "0.05", loss=loss_config))
        if who == "torch":
            monkeypatch.setattr(classification, "mix_batch", blend)
            monkeypatch.setattr(classification, "training_loss", dense_loss)
        taken = losses.setdefault(who, [])
        batches = list(run.train_loader)
        for step in range(100):
            ((loss, images),) = train_step(run, [batches[step % len(batches)]])
            taken.append(float(loss) / images)
    assert losses["ours"] == pytest.approx(losses["torch"], rel=1e-6, abs=1e-6)
    assert abs(losses["ours"][-1] - losses["ours"][0]) > 1e-2, "the run hardly moved: nothing was shown"


def blend(images: Tensor, labels: Tensor, lam: float) -> tuple[Tensor, Targets]:
    """Mixup by torch alone."""
    return lam * images + (1 - lam) * images.flip(0), Targets(labels, labels.flip(0), lam)


def dense_loss(
    logits: Tensor, targets: Targets, config: LossConfig, distill: DistillConfig, class_weights: Tensor | None
) -> Tensor:
    """Summed cross-entropy against dense targets; no teacher, no weights."""
    assert not distill.teacher and class_weights is None

    def dense(labels: Tensor) -> Tensor:
        wrong = config.smoothing / (logits.shape[1] - 1)
        return torch.full_like(logits, wrong).scatter(1, labels[:, None], 1 - config.smoothing)

    target = dense(targets.labels)
    if targets.lam is not None and targets.labels_b is not None:
        target = targets.lam * target + (1 - targets.lam) * dense(targets.labels_b)
    return nn.functional.cross_entropy(logits, target, reduction="sum")


# ---------------------------------------------------------------------------------------------------------- host syncs
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_step_never_waits(precision: str, start: Callable[..., Run]) -> None:
    run = start(*TRICKS, "--precision", precision, accumulate=2)
    steps = list(groups(run))
    assert [len(batch) for batch in steps[-1]] == [8, 5], "the short last step is a part of what is watched"
    with NoHostCopy(), NoHostSync():
        for group in steps:
            train_step(run, group)
    assert run.log.flush(run.step, 0.0) > 0


def test_an_empty_micro_batch_never_waits_and_changes_nothing(start: Callable[..., Run]) -> None:
    """What the last step of an epoch gives to a rank whose images are used up."""
    run = start(*TRICKS)
    batch = next(iter(run.train_loader))
    before = weights(run)
    with NoHostCopy(), NoHostSync():
        train_step(run, [Batch(batch.images[:0], batch.labels[:0])])
    statistics = {name: value for name, value in weights(run).items() if "running" in name}
    assert same(statistics, {name: before[name] for name in statistics})
    assert all(bool(value.isfinite().all()) for value in weights(run).values())


PLANTED = {
    "item": lambda loss: loss.item(),
    "cpu": lambda loss: loss.cpu(),
    "to": lambda loss: loss.to("cpu"),
    "branch": lambda loss: 1 if loss > 0 else 2,
    "float": lambda loss: float(loss),
    "print": lambda loss: f"{loss}",
    "tolist": lambda loss: loss[None].tolist(),
    "mask": lambda loss: loss[None][loss[None] > 0],
    "nonzero": lambda loss: loss[None].nonzero(),
    "equal": lambda loss: torch.equal(loss, loss),
    "copy between devices": lambda loss: torch.empty((1,), device="meta").copy_(loss[None]),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_planted_wait_is_found(
    planted: Callable[[Tensor], Any], start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    judge = run.guard.judge
    monkeypatch.setattr(run.guard, "judge", lambda loss, *more: (planted(loss), judge(loss, *more))[1])
    group = next(groups(run))
    with (
        NoHostCopy(),
        NoHostSync(),
        pytest.raises(AssertionError, match=r"waits for the device|copies between devices"),
    ):
        train_step(run, group)


# ------------------------------------------------------------------------------------------------------- same seed, same run


def test_the_seed_decides_every_bit(start: Callable[..., Run]) -> None:
    states = []
    for seed in (3, 3, 4):
        run = start(*TRICKS, "--seed", str(seed))
        fit(run)
        states.append(final_state(run))
    assert same(states[0], states[1])
    assert not any(
        torch.equal(states[0]["model"][name], states[2]["model"][name]) for name in ("fc.weight", "bn1.weight")
    )


def test_mixup_draws_for_each_micro_batch_of_each_step(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int, int, float]] = []

    def spy(alpha: float, *, seed: int, step: int, rank: int) -> float:
        lam = draw_lam(alpha, seed=seed, step=step, rank=rank)
        drawn.append((seed, step, rank, lam))
        return lam

    monkeypatch.setattr("fasttricks.learning.learner.draw_lam", spy)
    run = start(*TRICKS, seed=7, accumulate=2)
    for group in groups(run):
        train_step(run, group)
    assert [entry[:3] for entry in drawn] == [(7, step, 0) for step in range(6)]
    assert len({lam for *_, lam in drawn}) == 6


# -------------------------------------------------------------------------------------------------------------- order
@dataclass
class Noting:
    """A loader that notes when it is asked for a batch."""

    loader: Any
    events: list[str]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            self.events.append("drawn")
            yield batch
        self.events.append("ended")


def test_a_micro_batch_is_drawn_once_the_one_before_is_launched(
    start: Callable[..., Run], square_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight a step, of which the loader has two ahead: a GPU has work while the others are made. The last step has fewer."""
    events: list[str] = []
    run = start(*PLAIN, "--data.prefetch", "2", data_dir=square_data, global_batch_size=16, accumulate=8)
    loader = run.train_loader
    run.train_loader = Noting(loader, events)  # type: ignore[assignment]
    for name in ("add_gradients", "update"):
        work = getattr(trainer, name)

        def noted(*arguments: Any, name: str = name, work: Callable[..., Any] = work) -> Any:
            done = work(*arguments)
            events.append(name)
            return done

        monkeypatch.setattr(trainer, name, noted)
    with run.claim:
        trainer.train_epoch(run)
        run.log.close(draw=False)
    whole, rest = ["drawn", "add_gradients"] * 8, ["drawn", "add_gradients"] * 7
    assert events == [*whole, "update", *whole, "update", *rest, "update", "ended"]
    assert (run.step, run.epoch) == (3, 1)
    position = loader.state_dict()
    assert (position["epoch"], position["step"]) == (1, 0)


def test_batches_leave_torchs_generator_alone(start: Callable[..., Run], square_data: Path) -> None:
    """Dropout draws from it; micro-batches are drawn in between."""
    run = start(*TRICKS, data_dir=square_data)
    before = torch.get_rng_state()
    assert sum(map(len, run.train_loader)) == 45
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_stopped_run_goes_on_bit_for_bit(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped before any save, right after one, and between two."""
    begin = partial(start, *TRICKS, epochs=3, accumulate=2)
    whole = begin()
    fit(whole)
    assert [r["step"] for r in records(whole) if "train_loss" in r] == list(range(1, 10))
    assert [r["step"] for r in records(whole) if "top1" in r] == [3, 6, 9]
    for at_step in (2, 6, 8):
        folder = tmp_path / f"stopped at {at_step}"
        interrupt(begin(run_dir=folder), monkeypatch, at_step=at_step)
        resumed = begin(run_dir=folder, resume=True)
        assert resumed.step == at_step // 3 * 3
        fit(resumed)
        assert same(final_state(whole), final_state(resumed)), at_step
        assert records(whole) == records(resumed), at_step


def test_an_fp16_run_goes_on_bit_for_bit(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a step that overflowed before the kill: scale, its counters, masters, average and momentum are all restored."""
    begin = partial(start, *TRICKS, "--precision", "fp16", "--optim.loss-scale-steps", "2", epochs=2)
    whole = begin()
    whole.loss_scale.value.fill_(2.0**40)
    fit(whole)
    scales = [(r["loss_scale"], r["skipped_steps"]) for r in records(whole) if "train_loss" in r]
    assert scales[0] == (2.0**39, 1)
    assert len({scale for scale, _ in scales}) > 2, "the scale shall have moved"
    folder = tmp_path / "stopped"
    stopped = begin(run_dir=folder)
    stopped.loss_scale.value.fill_(2.0**40)
    interrupt(stopped, monkeypatch, at_step=5)
    resumed = begin(run_dir=folder, resume=True)
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)
    saved = load_checkpoint(folder)
    assert {v.dtype for k, v in saved["model"].items() if "num_batches" not in k} == {torch.float32}


def test_a_finished_run_that_is_resumed_is_measured_again_and_changes_nothing(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    first = start(run_dir=tmp_path / "run")
    summary, state, lines = fit(first), final_state(first), records(first)
    again = start(run_dir=tmp_path / "run", resume=True)
    assert fit(again) == summary
    assert records(again) == lines
    assert same(final_state(again), state)


# -------------------------------------------------------------------------------------------------------------- the rest
def test_bf16_autocast_trains_on_the_cpu(start: Callable[..., Run]) -> None:
    """Weights and their gradients stay FP32, activations are bf16: the run differs from fp32 from the first step, by a little."""
    seen: set[torch.dtype] = set()
    results = {}
    for precision in ("fp32", "bf16"):
        run = start(*PLAIN, "--precision", precision)
        hook = run.model.fc.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
        for group in groups(run):
            train_step(run, group)
        hook.remove()
        results[precision] = weights(run)
    assert seen == {torch.float32, torch.bfloat16}
    assert {value.dtype for value in results["bf16"].values() if value.is_floating_point()} == {torch.float32}
    difference = (results["fp32"]["fc.weight"] - results["bf16"]["fc.weight"]).abs().max()
    assert 0 < difference < 0.01


def test_validation_and_saving_at_their_intervals(start: Callable[..., Run]) -> None:
    run = start(epochs=5, checkpoint_epochs=2, eval=EvalConfig(every_epochs=3))
    fit(run)
    assert [r["epoch"] for r in records(run) if "top1" in r] == [3, 5]
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["best.pt", "step-0000000012.pt", "step-0000000015.pt"], "after epochs 4 and 5, the newest two"


def test_micro_batches_before_the_last_do_not_sum_over_ranks(start: Callable[..., Run]) -> None:
    run = start()
    assert isinstance(trainer.synced_gradients(run, last=False), nullcontext), "nothing to hold back without ranks"
