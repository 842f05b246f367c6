"""The training run: fit() goes through it, train_step() is one update. The file to read first; build.py puts a Run together."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttricks.checkpoint import checkpoint_path, keep_newest, newest_checkpoint, save_checkpoint
from fasttricks.compiled import compiled_graphs
from fasttricks.config import TrainConfig
from fasttricks.data import Batch, Loader
from fasttricks.distributed import World, lost_rank
from fasttricks.divergence import MOST_SKIPPED, DivergedError, LossGuard, first_not_finite
from fasttricks.evaluation import Metrics, evaluate
from fasttricks.log import RunLog
from fasttricks.losses import Targets, draw_lam, mix_batch, training_loss
from fasttricks.monitor import GpuMonitor
from fasttricks.optim import WeightAverage, master_state_dict, set_lr
from fasttricks.precision import LossScale, resolve_precision
from fasttricks.process import command_to_resume
from fasttricks.profiling import StepProfiler
from fasttricks.runfolder import write_json
from fasttricks.signals import StopRequest
from fasttricks.spans import span, spanned
from fasttricks.teacher import Teacher
from fasttricks.teacher_cache import CachedTeacher

KEPT_CHECKPOINTS = 2


class Stopped(Exception):
    """The run was asked to stop, and has saved where it stands; says how to go on."""


@dataclass
class Run:
    """A run and all it is made of. `step` counts updates done, `epoch` epochs done."""

    config: TrainConfig
    world: World
    classes: tuple[str, ...]
    num_train_images: int
    model: nn.Module
    forward: nn.Module
    """`model`, or what wraps it to sum the gradients over ranks."""
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    average: WeightAverage | None
    train_loader: Loader
    val_loader: Loader
    autocast: Callable[[], AbstractContextManager[object]]
    lr_at: Callable[[int], float]
    folder: Path
    log: RunLog
    monitor: GpuMonitor
    profiler: StepProfiler
    guard: LossGuard
    stop: StopRequest
    teacher: Teacher | None = None
    """Of a distillation; None without."""
    teacher_cache: CachedTeacher | None = None
    """Asked in the teacher's place where the config says so."""
    fingerprint: str = "{}"
    """JSON of what must be the same to resume (resume.py)."""
    step: int = 0
    epoch: int = 0
    unmeasured: bool = False
    """The last epoch is trained and its validation is still to come."""
    first_epoch: int = 0
    """Epochs that an earlier process had done, of a resumed run."""
    train_seconds: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        """Updates an epoch; the last may have fewer images, and fewer micro-batches."""
        return count_steps(self.train_loader, self.config)

    @property
    def step_in_epoch(self) -> int:
        """Updates done of the epoch at hand; 0 at an epoch's end, when all ranks have one model."""
        return self.step % self.steps_per_epoch

    def images_in_step(self) -> int:
        """Images of the step at hand, over all its micro-batches and ranks. Arithmetic only, no collective."""
        first = self.step_in_epoch * self.config.accumulate
        last = min(first + self.config.accumulate, len(self.train_loader))
        return sum(map(self.train_loader.global_count, range(first, last)))


def count_steps(loader: Sized, config: TrainConfig) -> int:
    """Updates an epoch takes with `loader`, whose length is its batches an epoch."""
    return -(-len(loader) // config.accumulate)


# ------------------------------------------------------------------------------------------------ a training step
def train_step(run: Run, batches: list[Batch]) -> None:
    """One update from this rank's micro-batches. The gradient is the mean over the step's images on all ranks.

    Nothing here waits for the device: no .item(), no copy to the host, no branch on a tensor; but for a cache of the
    teacher's logits (distill.cache) while it is being filled.
    """
    config, world = run.config, run.world
    # losses are sums over images; ranks' gradients are averaged
    scale = run.loss_scale.value * (world.size / run.images_in_step())
    seed_dropout(config.seed, step=run.step, rank=world.rank)
    for index, batch in enumerate(batches):
        images, targets = prepare(run, batch, draw=run.step * config.accumulate + index)
        with synced_gradients(run, last=index == len(batches) - 1):
            with span("forward"), run.autocast():
                logits = run.forward(images)
            with span("backward"):
                loss = training_loss(logits, targets, config.loss, config.distill)
                loss, counted = run.guard.judge(loss, len(batch.labels), run.step)
                torch.autograd.backward(loss * scale)
        run.log.add(*counted)
    with span("step"):
        set_lr(run.optimizer, run.lr_at(run.step))
        run.loss_scale.step(run.optimizer, check=run.guard.skip)
        run.optimizer.zero_grad()
        if run.average is not None:
            run.average.update()
    run.step += 1


# ----------------------------------------------------------------------------------------------------------------


def prepare(run: Run, batch: Batch, draw: int) -> tuple[Tensor, Targets]:
    """What the network is to see and to say: mixed, and judged by the teacher, as the config says. draw: which lambda."""
    config, (images, targets) = run.config, (batch.images, Targets(batch.labels))
    if config.loss.mixup_alpha > 0:
        lam = draw_lam(config.loss.mixup_alpha, seed=config.seed, step=draw, rank=run.world.rank)
        images, targets = mix_batch(images, batch.labels, lam)
    if run.teacher is not None:
        with span("teacher"):
            seen = run.teacher_cache(batch) if run.teacher_cache else run.teacher(images)
            targets = targets._replace(teacher_logits=seen)
    return images, targets


def synced_gradients(run: Run, *, last: bool) -> AbstractContextManager[object]:
    """Let the last micro-batch alone sum the gradients over the ranks."""
    if isinstance(run.forward, DistributedDataParallel) and not last:
        return run.forward.no_sync()
    return nullcontext()


def seed_dropout(seed: int, *, step: int, rank: int) -> None:
    """Give the network's own random layers the stream of (seed, step, rank), so that a resumed run draws as it would have.

    20 microseconds on the host; no sync.
    """
    entropy = np.random.SeedSequence(seed << 96 | step << 32 | rank)
    torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def fit(run: Run) -> dict[str, Any]:
    """Train to the end, validating and saving as the config says. Returns the summary, which is in summary.json too.

    Raises Stopped where a signal asked for it (signals.py), after saving; DivergedError for a loss that is no use.
    """
    config, metrics, draw = run.config, None, True
    run.log.start()
    try:
        while run.epoch < config.epochs or run.unmeasured:
            if not run.unmeasured:  # else stopped between an epoch and its validation
                train_epoch(run)
            last = run.epoch == config.epochs
            if run.unmeasured:
                metrics = validate(run)
            if last or run.epoch % config.checkpoint_epochs == 0 or steps_due(run):
                save(run)
            if not last:
                stop_if_asked(run)
        metrics = metrics or measure(run)  # a finished run that was resumed: it is in the log already
        run.stop.close()
    except RuntimeError as error:
        draw = not lost_rank(error)  # torchrun waits to start all ranks again
        raise
    finally:
        run.monitor.close()
        run.profiler.close()
        run.log.close(draw=draw)
    return summarize(run, metrics)


def train_epoch(run: Run) -> None:
    """One pass over the training images, or what is left of it."""
    config = run.config
    run.log.resume_clock()
    run.monitor.take()  # what was read during validation is no part of the epoch
    batches = spanned("data", run.train_loader)
    while group := list(islice(batches, config.accumulate)):
        train_step(run, group)
        run.profiler.step()
        if run.step % config.log_steps == 0:
            run.train_seconds += report(run)
        run.stop.poll()
        if run.step_in_epoch:
            stop_if_asked(run)
            if steps_due(run):
                save(run)
    run.train_seconds += report(run)
    share_statistics(run)
    run.epoch += 1
    run.unmeasured = run.epoch == config.epochs or run.epoch % config.eval.every_epochs == 0
    stop_if_asked(run)


def steps_due(run: Run) -> bool:
    """Whether a save is due by checkpoint_steps."""
    return run.config.checkpoint_steps > 0 and run.step % run.config.checkpoint_steps == 0


def stop_if_asked(run: Run) -> None:
    """Save and raise Stopped, on all ranks alike, where any was told to end."""
    if run.stop.agreed:
        save(run)
        raise Stopped(f"after step {run.step}, saved; go on with: {command_to_resume()}")


def stoppable(run: Run, batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches` of a validation, which ends between two of them where the run is to stop."""
    for batch in batches:
        run.stop.poll()
        stop_if_asked(run)
        yield batch


def report(run: Run) -> float:
    """Log the steps since the last report; returns the seconds they took. The one place where training waits.

    Raises DivergedError for a loss that is no use; where such are skipped, for very many in a row.
    """
    check_losses(run)

    def more() -> dict[str, float]:
        compiled = {"compiled_graphs": compiled_graphs()} if run.config.compile != "off" else {}
        skipped = {"skipped_losses": run.guard.skipped} if run.guard.skip else {}
        return run.loss_scale.report() | compiled | skipped | run.monitor.take()

    return run.log.flush(run.step, run.lr_at(run.step - 1), more)


def check_losses(run: Run) -> None:
    """Raise DivergedError where a loss since the last look was bad. A collective and a sync."""
    bad = run.guard.look()
    if bad is None or (run.guard.skip and not bad.hopeless):
        return
    lr, scale = run.lr_at(bad.step), run.loss_scale.report().get("loss_scale", 1.0)
    what = f"loss = {bad.loss:g} in step {bad.step + 1} at lr {lr:.4g}, loss scale {scale:g}"
    what += f", and {MOST_SKIPPED} or more in a row" if run.guard.skip else ""
    rule = f"must be finite and at most max_loss ({run.config.max_loss:g})"
    way_out = "lower --optim.base-lr or lengthen --schedule.warmup-epochs in a new run"
    way_out += "" if run.guard.skip else ", or resume with --on-bad-loss skip"
    raise DivergedError(f"{what}: {rule}; {way_out}; {last_good(run)}")


def share_statistics(run: Run) -> None:
    """Give all ranks the mean of their batch-norm statistics, so that they validate and save one model. A collective.

    In between each rank's are its own, from its own images, as in the paper.
    """
    models = [run.model] + ([run.average.model] if run.average is not None else [])
    for buffer in (buffer for model in models for buffer in model.buffers()):
        if run.world.size > 1 and buffer.is_floating_point():
            run.world.sum_(buffer).div_(run.world.size)


def measure(run: Run) -> Metrics:
    """Validation metrics of the averaged weights, or of the weights where no average is kept."""
    model = run.average.model if run.average is not None else run.model
    batches = stoppable(run, run.val_loader)
    return evaluate(model, batches, run.world, flip=run.config.eval.flip, autocast=run.autocast)


def validate(run: Run) -> Metrics:
    """Measure, and record it."""
    metrics = measure(run)
    fewer = {"val_images": metrics.images} if metrics.images < run.val_loader.shards.num_images else {}  # bad files
    run.log.validated(run.step, {"top1": metrics.top1, "top5": metrics.top5, "val_loss": metrics.loss, **fewer})
    run.unmeasured = False
    return metrics


def save(run: Run) -> None:
    """Write a checkpoint and drop the oldest. A collective, and a sync: every rank adds what it alone knows.

    Never replaces a good one by a bad: raises DivergedError where a loss since the last look, or a weight, is no use.
    """
    check_losses(run)
    ranks = run.world.collect(encode(rank_state(run)))
    if not run.world.is_main:
        return
    state = {
        "config": json.dumps(dataclasses.asdict(run.config)),
        "classes": list(run.classes),
        "fingerprint": run.fingerprint,
        "hardware": run.world.device_name,
        "step": run.step,
        "epoch": run.epoch,
        "step_in_epoch": run.step_in_epoch,
        "unmeasured": run.unmeasured,
        "train_seconds": run.train_seconds,
        "skipped_losses": run.guard.skipped,
        "model": master_state_dict(run.model, run.optimizer),
        "optimizer": run.optimizer.state_dict(),
        "loss_scale": run.loss_scale.state_dict(),
        "average": run.average.model.state_dict() if run.average is not None else None,
        "average_updates": run.average.num_updates if run.average is not None else 0,
        "ranks": [torch.load(io.BytesIO(rank), weights_only=True, map_location="cpu") for rank in ranks],
    }
    if bad := first_not_finite(state):
        rule = "must be finite to be saved: the run has diverged; lower --optim.base-lr in a new run"
        raise DivergedError(f"{bad} after step {run.step}: {rule}; {last_good(run)}")
    folder = run.folder / "checkpoints"
    save_checkpoint(checkpoint_path(folder, run.step), state)
    keep_newest(folder, KEPT_CHECKPOINTS, also=lambda step: step % run.steps_per_epoch == 0)


def rank_state(run: Run) -> dict[str, Any]:
    """What this rank alone knows: where its loader and its log stand and, within an epoch, its batch-norm statistics."""
    apart = run.world.size > 1 and run.step_in_epoch > 0
    average = run.average.model if run.average is not None else None
    return {
        "loader": run.train_loader.state().decode(),
        "log": run.log.state(),
        "buffers": dict(run.model.named_buffers()) if apart else {},
        "average_buffers": dict(average.named_buffers()) if apart and average is not None else {},
    }


def encode(state: dict[str, Any]) -> bytes:
    """`state` as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def last_good(run: Run) -> str:
    """Names the newest checkpoint, in words."""
    newest = newest_checkpoint(run.folder / "checkpoints")
    return f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"


def how_to_go_on(run: Run) -> str:
    """What to tell the user of a run that failed before its end."""
    newest = newest_checkpoint(run.folder / "checkpoints")
    kept = f"from {newest}" if newest else "from the beginning, as no checkpoint was saved yet"
    return f"add --resume to the same command to go on {kept}"


def images_per_joule(run: Run) -> dict[str, float]:
    """Images that this process has trained on, over the energy of all ranks' GPUs since; empty where it is not known.

    Validation and what came between are in the energy. A collective.
    """
    joules = run.world.sum_(torch.tensor(run.monitor.energy_j, dtype=torch.float64, device=run.world.device)).item()
    images = (run.epoch - run.first_epoch) * run.num_train_images
    return {"images_per_joule": images / joules} if images and joules > 0 else {}


def bad_images(run: Run) -> dict[str, str]:
    """The files, of both splits, that any rank could not use, and why: replaced in training, left out in validation.

    A collective.
    """
    known = run.world.gather(json.dumps(run.train_loader.bad | run.val_loader.bad).encode())
    return dict(sorted({name: why for rank in known for name, why in json.loads(rank).items()}.items()))


def summarize(run: Run, metrics: Metrics) -> dict[str, Any]:
    """The result of a finished run, written as summary.json and printed as one line. A collective."""
    images = run.config.epochs * run.num_train_images
    summary = {
        "recipe": run.config.recipe,
        "top1": metrics.top1,
        "top5": metrics.top5,
        "val_loss": metrics.loss,
        "val_images": metrics.images,
        "epochs": run.config.epochs,
        "steps": run.step,
        "train_seconds": run.train_seconds,
        "images_per_sec": images / run.train_seconds,
        "device": run.world.device_name,
        "ranks": run.world.size,
        "precision": resolve_precision(run.config.precision, run.world.device),
        **run.loss_scale.report(),
        **({"skipped_losses": run.guard.skipped} if run.guard.skip else {}),
        **images_per_joule(run),
        "bad_images": bad_images(run),
    }
    if run.world.is_main:
        write_json(run.folder / "summary.json", summary)
    line = f"top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  {summary['images_per_sec']:,.0f} imgs/sec"
    run.log.print(f"{line}  {run.train_seconds:,.0f} s of training  everything is in {run.folder}/")
    return summary
