"""Means, and the difference of two settings that were trained with the same seeds: Student's t, exact. No torch.

Oracles: published quantiles of t, and numpy, in tests/test_statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

CONFIDENCE = 0.95
MIN_SEEDS = 3
"""Seeds from which on a difference is judged: one has no spread, and two lie close together by chance too often."""
REAL = "real"
_NOTHING = 1e-9
"""A spread below it is the rounding of float64, in points of 0 to 100."""


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of one value or more."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the population that `values` are a sample of (n - 1); None for one value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def t_within(t: float, dof: int) -> float:
    """P(|T| <= t) of Student's t with `dof` degrees of freedom, 1 or more: a finite sum for whole dof.

    Source: Abramowitz and Stegun, 26.7.3 (odd dof) and 26.7.4 (even).
    """
    angle = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, cosine) if dof % 2 else (1.0, 1.0)
    for k in range(2 + dof % 2, dof - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if dof % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if dof > 1 else 0.0))


def t_quantile(dof: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence, 0 < confidence < 1: 4.303 for 2 degrees of freedom at 95 %."""
    low, high = 0.0, 1.0
    while t_within(high, dof) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, dof) < confidence else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """Mean of the differences seed by seed, in the values' unit, and half the width of its confidence interval."""

    mean: float
    deviation: float | None
    count: int
    resolution: float = 0.0
    """Smallest step between two values, as one image of the validation is of an accuracy; 0: they are continuous."""

    @property
    def half_width(self) -> float | None:
        """Ends of the 95 % t interval; None below MIN_SEEDS, and where the seeds show no spread that it could be made of."""
        if self.count < MIN_SEEDS or self.deviation is None or self.deviation < _NOTHING:
            return None
        return t_quantile(self.count - 1) * self.deviation / math.sqrt(self.count)

    @property
    def verdict(self) -> str:
        """real: the interval leaves 0 out. Not judged: below MIN_SEEDS, without spread, or a mean within the resolution."""
        if self.count < MIN_SEEDS:
            return f"{'one seed' if self.count == 1 else f'{self.count} seeds'}: not judged"
        half = self.half_width
        if half is None:
            return "no spread between seeds: not judged"
        if self.resolution and abs(self.mean) <= self.resolution + _NOTHING:
            return "within one image: not judged"
        return REAL if abs(self.mean) > half else "not decided"

    def would_be_decided_by(self, count: int) -> bool:
        """Whether the difference is not real now, and would be with `count` seeds, mean and spread staying as they are."""
        return self.verdict != REAL and replace(self, count=count).verdict == REAL


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], resolution: float
) -> Difference | None:
    """values - baseline over the seeds that both have; None where there is none. resolution: as of Difference."""
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    return Difference(mean(differences), deviation(differences), len(differences), resolution) if differences else None
