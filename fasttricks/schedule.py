"""Learning rate as a pure function of the step: linear warm-up, then a cosine or steps (sections 3.1 and 5.1).

Steps count from 0 over the whole run. Nothing here has state, so a resumed run has the rate of the uninterrupted one.
"""

import math

from fasttricks.config import ScheduleConfig


def warmup(step: int, num_warmup_steps: int) -> float:
    """Share of the peak rate at `step` of the warm-up: batch i of m, counted from 1, runs at i / m (section 3.1)."""
    return (step + 1) / num_warmup_steps


def cosine(step: int, num_steps: int) -> float:
    """Share of the peak rate at batch t of T after the warm-up: (1 + cos(t pi / T)) / 2, 1 at t = 0 (section 5.1)."""
    return 0.5 * (1.0 + math.cos(math.pi * step / num_steps))


def step_decay(epoch: float, step_epochs: tuple[float, ...], factor: float) -> float:
    """Share of the peak rate once `epoch` epochs are done: factor ** (number of step_epochs reached)."""
    return factor ** sum(epoch >= at for at in step_epochs)


def learning_rate(step: int, config: ScheduleConfig, *, peak_lr: float, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of the update at `step`, 0 <= step < epochs x steps_per_epoch.

    Warm-up takes round(warmup_epochs x steps_per_epoch) steps, at most all but one. Step epochs count from the start of
    the run, warm-up included, as in the paper (divided by 10 at epochs 30, 60, 90).
    """
    num_steps = epochs * steps_per_epoch
    num_warmup = min(round(config.warmup_epochs * steps_per_epoch), num_steps - 1)
    if step < num_warmup:
        return peak_lr * warmup(step, num_warmup)
    if config.decay == "cosine":
        return peak_lr * cosine(step - num_warmup, num_steps - num_warmup)
    return peak_lr * step_decay(step / steps_per_epoch, config.step_epochs, config.step_factor)
