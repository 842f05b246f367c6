"""The training run: fit() goes through it, train_step() is one update. The file to read first; build.py puts a Run together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fasttricks.data.batch import Batch
from fasttricks.learning.compiled import compiled_graphs
from fasttricks.learning.optim import set_lr
from fasttricks.system.distributed import lost_rank
from fasttricks.system.process import command_to_resume
from fasttricks.system.spans import span, spanned
from fasttricks.tasks.classification import Metrics, evaluate
from fasttricks.tasks.losses import Targets, draw_lam, mix_batch, training_loss
from fasttricks.training.run import Run
from fasttricks.training.saving import check_losses, save, summarize


class Stopped(Exception):
    """The run was asked to stop, and has saved where it stands; says how to go on."""


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
                loss, counted = run.guard.judge(loss, len(batch), run.step)
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
