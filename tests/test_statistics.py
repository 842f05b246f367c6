"""Student's t against printed tables, means and deviations against numpy, and what is said of a difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttricks.ablation.statistics import REAL, Difference, deviation, mean, paired_difference, t_quantile, t_within

# Two-sided quantiles as printed in the NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2: dof -> (95 %, 99 %).
PRINTED = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    7: (2.365, 3.499),
    10: (2.228, 3.169),
    29: (2.045, 2.756),
    30: (2.042, 2.750),
    100: (1.984, 2.626),
}


@pytest.mark.parametrize(("dof", "quantiles"), PRINTED.items())
def test_quantiles_are_those_printed(dof: int, quantiles: tuple[float, float]) -> None:
    assert t_quantile(dof, 0.95) == pytest.approx(quantiles[0], abs=5.01e-4)
    assert t_quantile(dof, 0.99) == pytest.approx(quantiles[1], abs=5.01e-4)


@pytest.mark.parametrize("dof", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("t", [0.3, 1.0, 4.0])
def test_probability_is_that_of_torchs_density(t: float, dof: int) -> None:
    """Simpson's rule over the density that torch.distributions has."""
    x = torch.linspace(-t, t, 2001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(float(dof), dtype=torch.float64)).log_prob(x).exp()
    weights = torch.full_like(x, 2.0)
    weights[1::2] = 4.0
    weights[0] = weights[-1] = 1.0
    area = (density * weights).sum().item() * (2 * t / 2000) / 3
    assert t_within(t, dof) == pytest.approx(area, abs=1e-9)


def test_mean_and_deviation_are_numpys() -> None:
    values = [71.2, 70.4, 72.9, 71.0]
    assert mean(values) == pytest.approx(np.mean(values), abs=1e-12)
    assert deviation(values) == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    assert deviation([71.2]) is None


def test_pairs_are_by_seed() -> None:
    """The differences are 1, 2, 3: mean 2, deviation 1, half width 4.303 / sqrt(3). Seeds of one side alone do not count."""
    difference = paired_difference({0: 11, 1: 22, 2: 33, 7: 99}, {2: 30, 1: 20, 0: 10, 8: 0}, resolution=0.5)
    assert difference is not None
    assert (difference.mean, difference.deviation, difference.count, difference.resolution) == (2, 1, 3, 0.5)
    assert difference.half_width == pytest.approx(4.302653 / np.sqrt(3), abs=1e-5)
    assert difference.verdict == "not decided"
    assert paired_difference({0: 1.0}, {1: 1.0}, resolution=0) is None


IMAGE = 100 / 114
"""Percent that one of 114 validation images is."""


@pytest.mark.parametrize(
    ("images", "verdict", "interval"),
    [
        ([86], "one seed: not judged", False),
        ([-1, -1], "2 seeds: not judged", False),
        ([-50, -51], "2 seeds: not judged", False),
        ([-1, -1, -1], "no spread between seeds: not judged", False),
        ([-9, -9, -9, -9], "no spread between seeds: not judged", False),
        ([0, 0, 0], "no spread between seeds: not judged", False),
        ([*[-1] * 11, -2, 0], "within one image: not judged", True),
        ([*[1] * 10, 0, 1, 1], "within one image: not judged", True),
        ([-2, -2, -2, -2, -1], REAL, True),
        ([-4, -4, -5], REAL, True),
        ([4, 5, 4], REAL, True),
        ([2, 0, 4], "not decided", True),
    ],
    ids=str,
)
def test_no_noise_is_called_real(images: list[int], verdict: str, interval: bool) -> None:
    """Differences of so many of 114 images, one a seed, from counts that do not cancel in float64."""
    base = {seed: (40 + 7 * seed) * IMAGE for seed in range(len(images))}
    values = {seed: (40 + 7 * seed + more) * IMAGE for seed, more in enumerate(images)}
    difference = paired_difference(values, base, resolution=IMAGE)
    assert difference is not None
    assert difference.mean == pytest.approx(np.mean(images) * IMAGE)
    assert difference.verdict == verdict
    assert (difference.half_width is not None) == interval
    if interval and verdict != "not decided":
        assert not difference.would_be_decided_by(20), "it is, or its mean would stay within an image"


def test_two_seeds_with_a_spread_may_be_decided_by_more() -> None:
    difference = Difference(mean=9.0, deviation=1.0, count=2, resolution=IMAGE)
    assert difference.half_width is None
    assert difference.would_be_decided_by(3)


def test_real_is_an_interval_that_leaves_0_out() -> None:
    assert Difference(mean=2.5, deviation=1.0, count=3).verdict == REAL  # 2.5 > 2.484
    assert Difference(mean=-2.5, deviation=1.0, count=3).verdict == REAL
    assert Difference(mean=2.4, deviation=1.0, count=3).verdict == "not decided"


@pytest.mark.parametrize(("middle", "nearly"), [(0.8, False), (0.9, True), (-0.9, True), (2.4, True), (2.6, False)])
def test_nearly_decided_is_what_eight_seeds_would_decide(middle: float, nearly: bool) -> None:
    """At deviation 1 the half width is 2.484 with three seeds and 0.836 with eight."""
    assert Difference(mean=middle, deviation=1.0, count=3).would_be_decided_by(8) == nearly
