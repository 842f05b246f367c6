"""The numbers of a step that the host works out: one place, so that a step on the device can be given them as tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor


class StepNumbers(NamedTuple):
    """Python's numbers; in a step that is replayed, () tensors on the device, float32 but for `step`."""

    step: int | Tensor
    """Updates done before it."""
    share: float | Tensor
    """The factor on the sum of this rank's losses: ranks / the step's images over all of them."""
    lam: float | Tensor
    """Mixup's lambda of the micro-batch; 1 without mixup."""
    lrs: tuple[float | Tensor, ...]
    """The learning rate of each of the optimizer's groups."""
    gain: float | Tensor
    """The share of the new weights in their average; 0 without one."""


def draw_lam(alpha: float, *, seed: int, step: int, rank: int) -> float:
    """Mixup's lambda ~ Beta(alpha, alpha), alpha > 0, in [0, 1]; a resumed run draws the same as the uninterrupted one.

    It is rounded to float32, as a tensor on the device holds it. A pure function of (seed, step, rank), each 0 or more. Source:
    section 5.4. Costs about 20 microseconds on the host; no sync.
    """
    return float(np.float32(np.random.default_rng((seed, step, rank)).beta(alpha, alpha)))
