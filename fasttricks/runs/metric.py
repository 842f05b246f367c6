"""A number that a run is judged by: its key in files, and how people are shown it. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """One of a task's metrics. Higher is better."""

    name: str
    """Its key in metrics.jsonl, summary.json and result.json."""
    label: str
    """Its name in words and tables, as `top-1`."""
    unit: str
    """Unit of its values, as `%`."""
    panel: tuple[str, str]
    """Title and y axis of its panel in curves.png; metrics of the same panel share it."""

    def show(self, value: float) -> str:
        """Name, value and unit, as `top-1 79.29 %`."""
        return f"{self.label} {value:.2f} {self.unit}"


def show_all(metrics: Iterable[Metric], values: Mapping[str, float]) -> str:
    """Each of `metrics` as show() has it, in one line."""
    return "  ".join(metric.show(values[metric.name]) for metric in metrics)
