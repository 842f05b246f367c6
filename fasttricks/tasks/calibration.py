"""A temperature for a classifier's logits: softmax(logits / T), fitted on one half of held-out images and judged on the other.

Source: Guo et al., 2017, "On Calibration of Modern Neural Networks", section 4.2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttricks.runs.calibration import COLDEST, HOTTEST, CalibrationError
from fasttricks.system.distributed import World
from fasttricks.tasks.answers import Answers, Outputs

_AT_ONCE = 1 << 22
"""Logits that are in float64 at a time: 32 MB."""
_STEPS = 200


class Fitted(NamedTuple):
    """A temperature, and its effect on images that it was not fitted on."""

    temperature: float
    fitted_images: int
    measured_images: int
    ece_before: float
    """Expected calibration error, 0 to 1, on the measured images; likewise the others."""
    ece_after: float
    nll_before: float
    """Mean negative log-likelihood, in nats."""
    nll_after: float


def calibrate(outputs: Outputs, names: Sequence[str]) -> Fitted:
    """The temperature that minimises the NLL of the images that to_fit() chooses, and its effect on the others.

    names: those of the images of `outputs`. Raises CalibrationError where a half is empty, where a logit is not finite, and as
    fit_temperature(). Cost: about 20 passes of softmax over the logits, on the CPU.
    """
    chosen = torch.tensor([to_fit(name) for name in names], dtype=torch.bool)
    if chosen.all() or not chosen.any():
        counts = f"{int(chosen.sum())} to fit on and {int((~chosen).sum())} to measure on"
        raise CalibrationError(f"calibrate: needs images in both halves, and has {counts}; give more validation images")
    if bad := int((~outputs.logits.isfinite().all(1)).sum()):
        raise CalibrationError(
            f"calibrate: {bad} images have logits that are not finite; give a checkpoint without NaN"
        )
    temperature = fit_temperature(outputs.logits[chosen], outputs.labels[chosen])
    logits, labels = outputs.logits[~chosen], outputs.labels[~chosen]
    before, after = (_judge(logits, labels, t) for t in (1.0, temperature))
    return Fitted(temperature, int(chosen.sum()), len(labels), before[0], after[0], before[1], after[1])


def to_fit(name: str) -> bool:
    """Whether the image CLASS/FILE is of the half to fit on: a bit of a hash of its name, whatever other images there are."""
    return bool(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=1).digest()[0] & 1)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T from COLDEST to HOTTEST that minimises the mean NLL of softmax(logits / T).

    logits: (N, K), finite; labels: (N,) int64. The NLL is convex in 1 / T, so its slope has one root, which Newton's method finds
    within a bracket, in float64, to 12 digits. Oracle: golden section in numpy (tests/test_calibration.py).
    Raises CalibrationError where the minimum lies outside: all images are right (T -> 0), or the logits are no better than none.
    """
    low, high = 1 / HOTTEST, 1 / COLDEST
    right = int((logits.argmax(1) == labels).sum())
    of = f"{right:,} of {len(labels):,} images to fit on are right"
    if right < len(labels) and _slopes(logits, labels, low)[0] >= 0:
        rule = f"no temperature up to {HOTTEST:g} fits, {of}: the network is no better than chance; train it first"
        raise CalibrationError(f"calibrate: {rule}")
    if _slopes(logits, labels, high)[0] <= 0:
        rule = f"no temperature down to {COLDEST:g} fits, {of}: the best is 0; give more or harder validation images"
        raise CalibrationError(f"calibrate: {rule}")
    beta = 1.0
    for _ in range(_STEPS):
        slope, bend = _slopes(logits, labels, beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        newton = beta - slope / bend if bend > 0 else low
        nearer = newton if low < newton < high else (low * high) ** 0.5
        done = abs(nearer - beta) <= 1e-12 * beta
        beta = nearer
        if done:
            break
    return 1 / beta


def _slopes(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float]:
    """First and second derivative by beta of the mean NLL of softmax(beta x logits)."""
    first = second = 0.0
    size = max(1, _AT_ONCE // logits.shape[1])
    for at in range(0, len(labels), size):
        z, label = logits[at : at + size].double(), labels[at : at + size]
        z = z - z.max(1, keepdim=True).values
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        first += float((mean - z.gather(1, label[:, None]).squeeze(1)).sum())
        second += float((p * (z - mean[:, None]) ** 2).sum())
    return first / len(labels), second / len(labels)


def _judge(logits: Tensor, labels: Tensor, temperature: float) -> tuple[float, float]:
    """(ECE, NLL) of softmax(logits / temperature)."""
    answers, numbers = Answers(logits.shape[1], torch.device("cpu")), np.arange(len(labels))
    size = max(1, _AT_ONCE // logits.shape[1])
    for at in range(0, len(labels), size):
        part = slice(at, at + size)
        answers.update(logits[part].double() / temperature, labels[part], numbers[part])
    found = answers.result(World.alone(torch.device("cpu")))
    return found.ece, found.nll
