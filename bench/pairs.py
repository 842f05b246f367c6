"""Measure contestants in alternation, so that a machine whose speed drifts is the same for all of them."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.1
"""Share of the CPUs that other work may take in a turn before the turn is taken again."""
TRIES = 3
LEAST = 3
"""Rounds that are measured however long they take: a median of fewer says little."""


@dataclass(frozen=True)
class Row:
    """One contestant: its median rate over the rounds, and ours over its, round by round."""

    name: str
    rate: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rates: tuple[float, ...]
    """One a round, in the order of the rounds."""
    others: float
    """Largest share of the CPUs, 0 to 1, that work which is not the benchmark's took in a turn that counts."""


def by_turns(
    contestants: Mapping[str, Callable[[], float]], rounds: int, *, until_s: float = math.inf, least: int = LEAST
) -> list[Row]:
    """Run every contestant once a round, after a round that does not count. The first is ours.

    until_s: time.monotonic() at which it shall be over. After `least` rounds none begins that would not be over by then, if it
    took as long as the one before; and no turn is taken again after that time.

    A contestant is a function that does its work once and returns a rate, in units of its choice, higher is better. Who begins
    a round changes from round to round. Ratios are ours / theirs within a round; their median, lowest and highest are kept.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    order, took = list(contestants), 0.0
    for measure in contestants.values():
        measure()
    for index in range(rounds):
        began = time.monotonic()
        if index >= least and began + took > until_s:
            break
        first = index % len(order)
        for name in order[first:] + order[:first]:
            turns[name].append(undisturbed(contestants[name], until_s=until_s))
        took = time.monotonic() - began
    ours = [rate for rate, _ in turns[order[0]]]
    rows = []
    for name, taken in turns.items():
        rates = tuple(rate for rate, _ in taken)
        ratios = [a / b for a, b in zip(ours, rates, strict=True)]
        middle = statistics.median(ratios)
        others = max(share for _, share in taken)
        rows.append(Row(name, statistics.median(rates), middle, min(ratios), max(ratios), rates, others))
    return rows


def undisturbed(measure: Callable[[], float], *, until_s: float = math.inf) -> tuple[float, float]:
    """A rate, and the share of the CPUs that other work took in the same time; the least disturbed of up to three rounds.

    None is taken again after `until_s`, by time.monotonic().
    """
    turns: list[tuple[float, float]] = []
    while len(turns) < TRIES:
        before = _cpu_seconds(), time.perf_counter()
        rate = measure()
        (all_after, own_after), now = _cpu_seconds(), time.perf_counter()
        (all_before, own_before), start = before
        others = (all_after - all_before) - (own_after - own_before)
        turns.append((rate, max(0.0, others) / (now - start) / (os.cpu_count() or 1)))
        if turns[-1][1] <= BUSY or time.monotonic() > until_s:
            break
    return min(turns, key=lambda turn: turn[1])


def show_ratio(ratio: float) -> str:
    """Two decimals; a small one with two digits."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def processes() -> Iterator[tuple[int, list[str]]]:
    """(pid, the fields of /proc/PID/stat behind the name: state, parent, group, ...) of every process of the machine."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        yield int(entry.name), fields


def _cpu_seconds() -> tuple[float, float]:
    """CPU time used since the boot: by all, and by this process and its children (its process group)."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, soft_irq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    group, own = os.getpgrp(), 0
    for _, fields in processes():
        if int(fields[2]) == group:
            own += sum(map(int, fields[11:15]))  # user and system, its own and of the children it has waited for
    return (user + nice + system + irq + soft_irq + steal) / ticks, own / ticks
