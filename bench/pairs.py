"""Measure contestants by turns, so that a machine whose speed drifts is the same for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One contestant: its median rate over the rounds, and ours over its, round by round."""

    name: str
    rate: float
    ratio: float
    ratio_low: float
    ratio_high: float


def by_turns(contestants: Mapping[str, Callable[[], float]], rounds: int) -> list[Row]:
    """Run every contestant once a round, after a round that does not count. The first is ours.

    A contestant is a function that does its work once and returns a rate, in units of its choice, higher is better.
    Ratios are ours / theirs within a round; their median, lowest and highest are kept.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_index in range(rounds + 1):
        for name, measure in contestants.items():
            rate = measure()
            if round_index:
                rates[name].append(rate)
    ours = next(iter(rates.values()))
    rows = []
    for name, theirs in rates.items():
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(Row(name, statistics.median(theirs), statistics.median(ratios), min(ratios), max(ratios)))
    return rows
