"""Learning rate as a pure function of the step: linear warm-up, then a cosine, steps or a power (sections 3.1, 5.1, 6.2).

And the side of the training images as one of the epoch: progressive resizing.

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


def poly(step: int, num_steps: int, power: float) -> float:
    """Share of the peak rate at batch t of T after the warm-up: (1 - t / T)^power, 1 at t = 0 (section 6.2, power 0.9)."""
    return float((1.0 - step / num_steps) ** power)


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
    if config.decay == "poly":
        return peak_lr * poly(step - num_warmup, num_steps - num_warmup, config.poly_power)
    return peak_lr * step_decay(step / steps_per_epoch, config.step_epochs, config.step_factor)


def image_size(epoch: int, config: ScheduleConfig, *, full: int, epochs: int) -> int:
    """Side of the training images in `epoch`, 0 <= epoch < epochs, pixels: a multiple of 4, or `full`.

    Progressive resizing: from first_size x full it grows in size_steps equal steps, and is `full` from epoch
    full_size_at x epochs on, rounded down: the last at least. Small images cost less (the time of a step goes with the
    square of the side) and show coarse shapes. It is not the paper's: fast.ai's entry to DAWNBench (2018) made it known.
    """
    growing = int(config.full_size_at * epochs)
    if epoch >= growing or config.first_size == 1:
        return full
    step = epoch * config.size_steps // growing
    share = config.first_size + (1 - config.first_size) * step / config.size_steps
    return min(full, max(8, round(share * full / 4) * 4))


def image_sizes(config: ScheduleConfig, *, full: int, epochs: int) -> list[int]:
    """The sides that a run has, in their order, each once."""
    return list(dict.fromkeys(image_size(epoch, config, full=full, epochs=epochs) for epoch in range(epochs)))
