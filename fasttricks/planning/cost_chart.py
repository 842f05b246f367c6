"""The picture of `python -m fasttricks.cost`: bars of each network's multiply-adds and time. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Bars(NamedTuple):
    """A network's two bars, relative to the first network's."""

    name: str
    multiply_adds: float
    time: tuple[float, float, float]
    """Time of a step: median, lowest and highest round."""
    paper: tuple[float, float] | None
    """The paper's multiply-adds and time, where it gives them."""


def draw(rows: Sequence[Bars], path: Path) -> None:
    """Draw `rows` as a PNG. Raises OSError as open()."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shared: dict[str, Any] = {"height": 0.36, "edgecolor": "dimgray", "linewidth": 0.6}
    above, below = ([place + shift for place in range(len(rows))] for shift in (-0.2, 0.2))
    adds, middles = [row.multiply_adds for row in rows], [row.time[0] for row in rows]
    spread = ([m - low for m, low, _ in (r.time for r in rows)], [high - m for m, _, high in (r.time for r in rows)])
    axes.barh(above, adds, color="lightgray", label="multiply-adds, counted", **shared)
    label = "time of a step: median, lowest and highest round"
    axes.barh(below, middles, xerr=spread, ecolor="black", capsize=3, color="tab:blue", label=label, **shared)
    text: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    for place, row in enumerate(rows):
        axes.annotate(f"{row.multiply_adds:.2f}", (row.multiply_adds, above[place]), **text)
        axes.annotate(f"{row.time[0]:.2f}", (row.time[2], below[place]), **text)
    star: dict[str, Any] = {"marker": "*", "markersize": 9, "linestyle": "none", "color": "tab:orange"}
    for place, row in enumerate(rows):
        if row.paper:
            axes.plot(
                row.paper, (above[place], below[place]), markeredgecolor="black", label="the paper, on V100s", **star
            )
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(*adds, *(row.time[2] for row in rows)))
    axes.set_xlabel(f"relative to {rows[0].name}'s     \N{LEFTWARDS ARROW} better")
    axes.set_title("A training step of each network", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
