"""The chart of a benchmark's result: a panel a table, a bar a contestant, ours in colour."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from bench.pairs import show_ratio

OURS, THEIRS, EDGE = "tab:blue", "lightgray", "dimgray"
WIDE = 30
"""Ratio of the highest rate to the lowest above which a panel's axis is logarithmic: the short bar would not be seen."""
TITLE_COLUMNS = 90
"""Characters that a panel's title has room for in a line, beside the longest of the contestants' names."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw `result`, as report.py writes it, as a PNG. Draws nothing where there is no table."""
    from matplotlib.figure import Figure

    tables = [table for part in result["tables"].values() for table in part]
    if not tables:
        return
    heights = [len(table["rows"]) + 1.2 for table in tables]
    figure = Figure(figsize=(10, 0.42 * sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(len(tables), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        _panel(axes, table)
    where = f"{result['device']}, commit {result['versions'].get('commit', 'unknown')}"
    figure.suptitle(f"Rates beside the usual alternatives, better \N{RIGHTWARDS ARROW}\n{where}", fontsize=10)
    how = "bars: median rate; whiskers: slowest and fastest round; N x: fasttricks / contestant, median over the rounds"
    figure.supxlabel(how, fontsize=9)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, table: dict[str, Any]) -> None:
    rows = table["rows"]
    rates = [row["rate"] for row in rows]
    below = [row["rate"] - min(row["rates"]) for row in rows]
    above = [max(row["rates"]) - row["rate"] for row in rows]
    colors = [OURS, *[THEIRS] * (len(rows) - 1)]
    bars = {"color": colors, "edgecolor": EDGE, "linewidth": 0.6, "height": 0.7}
    axes.barh([row["name"] for row in rows], rates, xerr=(below, above), ecolor="black", capsize=3, **bars)
    lowest, highest = min(min(row["rates"]) for row in rows), max(max(row["rates"]) for row in rows)
    is_wide = highest > WIDE * lowest
    if is_wide:
        axes.set_xscale("log")
        axes.set_xlim(lowest / 2, highest * 1.15)
    else:
        axes.set_xlim(0, highest * 1.02)
    for position, row in enumerate(rows):
        rate = f"{row['rate']:,.0f}" if row["rate"] >= 100 else f"{row['rate']:.2f}"
        ratio = f"   {show_ratio(row['ratio'])} x" if position else ""
        axes.text(1.01, position, rate + ratio, va="center", fontsize=9, transform=axes.get_yaxis_transform())
    axes.invert_yaxis()
    scale = ", logarithmic axis" if is_wide else ""
    title = textwrap.fill(f"{table['title']} ({table['unit']}{scale})", TITLE_COLUMNS)
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
