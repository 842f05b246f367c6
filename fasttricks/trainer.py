"""The training run: fit() goes through it, train_step() is one update. The file to read first; build.py puts a Run together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from fasttricks.learning.compiled import compiled_graphs, told_of_compiling
from fasttricks.learning.divergence import Counted
from fasttricks.learning.freezing import moving_buffers
from fasttricks.learning.learner import Learner
from fasttricks.learning.numbers import StepNumbers
from fasttricks.learning.optim import set_lr
from fasttricks.models import settle_counts
from fasttricks.system.failures import lost_rank
from fasttricks.system.process import command_to_resume
from fasttricks.system.spans import span, spanned
from fasttricks.training.run import Run, check_losses, save
from fasttricks.training.summary import summarize

T = TypeVar("T")


class Stopped(Exception):
    """The run was asked to stop, and has saved where it stands; says how to resume."""


# ------------------------------------------------------------------------------------------------ a training step
def train_step(learner: Learner, batches: Iterable[Any]) -> list[Counted]:
    """One update from this rank's micro-batches. The gradient is the mean over the step's images on all ranks.

    Each of `batches`, as many as learner.micro_batches, is asked for once the one before it is launched.
    Returns of each micro-batch (its loss, summed over its images; its images), as the log gets them, on the device. Nothing here
    waits for it: no .item(), no copy to the host, no branch on a tensor; but for a cache of the teacher's logits (distill.cache)
    while it is being filled.
    """
    counts: list[Counted] = []
    last = len(learner.micro_batches) - 1
    for index, batch in enumerate(batches):
        if index == 0:
            seed_dropout(learner.config.seed, step=learner.step, rank=learner.world.rank)
        numbers = learner.numbers(index)
        if learner.graph is not None:  # then a step has one micro-batch (check_graph)
            counts.append(learner.graph(partial(whole_step, learner), batch, numbers, full=learner.is_full))
            set_lr(learner.optimizer, numbers.lrs)  # a checkpoint has them as Python's
            continue
        with synced_gradients(learner, last=index == last):
            counts.append(add_gradients(learner, batch, numbers))
    if learner.graph is None:
        update(learner, numbers)
    learner.count_step(len(counts))
    return counts


def whole_step(learner: Learner, batch: Any, numbers: StepNumbers) -> Counted:
    """A step of one micro-batch. It changes nothing on the host."""
    counted = add_gradients(learner, batch, numbers)
    update(learner, numbers)
    return counted


def add_gradients(learner: Learner, batch: Any, numbers: StepNumbers) -> Counted:
    """The forward and the backward pass of a micro-batch. Its share of the log, as train_step returns it."""
    with span("forward"):
        loss, images = learner.task.loss(learner, batch, numbers.lam)
        loss, counted = learner.guard.judge(loss, images, numbers.step)
        learner.log_loss(*counted)
    with span("backward"):
        # losses are sums over images; ranks' gradients are averaged
        torch.autograd.backward(loss * (learner.loss_scale.value * numbers.share))
    return counted


def update(learner: Learner, numbers: StepNumbers) -> None:
    """The update of the weights and of their average from the gradients, which are then let go, and of batch norm's counters."""
    with span("step"):
        set_lr(learner.optimizer, numbers.lrs)
        learner.loss_scale.step(learner.optimizer, check=learner.guard.skip)
        learner.optimizer.zero_grad()
        settle_counts(learner.norms)
        if learner.average is not None:
            learner.average.blend(numbers.gain)


# ----------------------------------------------------------------------------------------------------------------


def synced_gradients(learner: Learner, *, last: bool) -> AbstractContextManager[object]:
    """Let the last micro-batch alone sum the gradients over the ranks."""
    if isinstance(learner.forward, DistributedDataParallel) and not last:
        return learner.forward.no_sync()
    return nullcontext()


def seed_dropout(seed: int, *, step: int, rank: int) -> None:
    """Give the network's own random layers the stream of (seed, step, rank), so that a resumed run draws as it would have.

    10 microseconds on the host of a CPU; no sync.
    """
    entropy = np.random.SeedSequence(seed << 96 | step << 32 | rank)
    number = int(entropy.generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)
    # before CUDA is there, torch.manual_seed would write down the stack of its calls for later: 0.2 ms
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(number)


def fit(run: Run) -> dict[str, Any]:
    """Train to the end, validating and saving as the config says. Returns the summary, which is in summary.json too.

    Raises Stopped where a signal asked for it (signals.py), after saving; DivergedError for a loss that is no use.
    The run folder is free for another process afterwards.
    """
    graphed = nullcontext() if run.graph is None else run.graph.running()
    with run.claim, run.log.loggers as loggers, told_of_compiling(run.config.compile, run.log.compiling), graphed:
        loggers.summary = summary = summarize(run, train(run))
        return summary


def train(run: Run) -> dict[str, float]:
    """All epochs that are left, to the last validation. Returns its metrics."""
    config, metrics, draw = run.config, None, True
    try:
        run.log.start(run.step)
        while (run.epoch < config.epochs and not run.gave_up) or run.unmeasured:
            if not run.unmeasured:  # else stopped between an epoch and its validation
                train_epoch(run)
            best = False
            if run.unmeasured:
                metrics = validate(run)
                best = run.best.judge(metrics[run.metrics[0].name], epoch=run.epoch, step=run.step)
            last = run.epoch == config.epochs or run.gave_up
            if last or best or run.epoch % config.checkpoint_epochs == 0 or steps_due(run):
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
    return metrics


def train_epoch(run: Run) -> None:
    """One pass over the training images, or the rest of one."""
    config = run.config
    run.log.resume_clock()
    run.monitor.take()  # readings during validation are not part of the epoch
    batches = spanned("data", run.train_loader if run.graph is None else run.graph.taken(run.train_loader))
    for _ in range(run.step_in_epoch, run.steps_per_epoch):
        train_step(run, islice(batches, len(run.micro_batches)))
        run.profiler.step()
        if run.step % config.log_steps == 0:
            run.train_seconds += report(run)
        run.stop.poll()
        if run.step_in_epoch:
            stop_if_asked(run)
            if steps_due(run):
                save(run)
    next(batches, None)  # none: the loader's epoch ends where another batch is asked for
    run.train_seconds += report(run)
    share_statistics(run)
    run.epoch += 1
    run.unmeasured = run.epoch == config.epochs or run.epoch % config.eval.every_epochs == 0
    stop_if_asked(run)


def steps_due(run: Run) -> bool:
    """Whether a save is due by checkpoint_steps."""
    return run.config.checkpoint_steps > 0 and run.step % run.config.checkpoint_steps == 0


def stop_if_asked(run: Run) -> None:
    """Save and raise Stopped, on all ranks alike, where any got a signal to stop."""
    if run.stop.agreed:
        save(run)
        raise Stopped(f"after step {run.step}, saved; resume with: {command_to_resume()}")


def stoppable(run: Run, batches: Iterable[T]) -> Iterator[T]:
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
    moving = list(moving_buffers(run.model))  # frozen statistics are the same on all, and their mean would round
    for buffer in (model.get_buffer(name) for model in models for name in moving):
        if run.world.size > 1 and buffer.is_floating_point():
            run.world.sum_(buffer).div_(run.world.size)


def measure(run: Run) -> dict[str, float]:
    """Validation metrics of the averaged weights, or of the weights where no average is kept."""
    model = run.average.model if run.average is not None else run.model
    return run.task.evaluate(model, stoppable(run, run.val_loader), run.world, run.config, run.autocast)


def validate(run: Run) -> dict[str, float]:
    """Measure, and record it; how many images that was only where some could not be used."""
    metrics = measure(run)
    whole = metrics["val_images"] == run.val_loader.shards.num_images
    run.log.validated(run.step, {name: value for name, value in metrics.items() if name != "val_images" or not whole})
    run.unmeasured = False
    return metrics
