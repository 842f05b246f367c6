"""The chart of a benchmark's result: a panel a table, a bar a contestant, ours in colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.pairs import show_ratio

OURS, THEIRS, EDGE = "tab:blue", "lightgray", "dimgray"


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw `result`, as report.py writes it, as a PNG. Draws nothing where there is no table."""
    from matplotlib.figure import Figure

    tables = [table for part in result["tables"].values() for table in part]
    if not tables:
        return
    heights = [len(table["rows"]) + 1.2 for table in tables]
    figure = Figure(figsize=(10, 0.42 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(tables), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, table in zip(panels, tables, strict=True):
        _panel(axes, table)
    commit = result["versions"].get("commit", "unknown")
    figure.suptitle(f"{result['device']}, commit {commit}", fontsize=10, color=EDGE)
    figure.supxlabel("bars: median rate, whiskers: slowest and fastest round; x: fasttricks / contestant", fontsize=9)
    figure.savefig(path, dpi=110)


def _panel(axes: Any, table: dict[str, Any]) -> None:
    rows = table["rows"]
    rates = [row["rate"] for row in rows]
    below = [row["rate"] - min(row["rates"]) for row in rows]
    above = [max(row["rates"]) - row["rate"] for row in rows]
    colors = [OURS, *[THEIRS] * (len(rows) - 1)]
    axes.barh([row["name"] for row in rows], rates, color=colors, xerr=(below, above), ecolor=EDGE, height=0.7)
    end = max(rate + more for rate, more in zip(rates, above, strict=True))
    for position, row in enumerate(rows):
        rate = f"{row['rate']:,.0f}" if row["rate"] >= 100 else f"{row['rate']:.2f}"
        ratio = f"   {show_ratio(row['ratio'])} x" if position else ""
        axes.text(end * 1.02, position, rate + ratio, va="center", fontsize=9)
    axes.set_xlim(0, end * 1.2)
    axes.invert_yaxis()
    axes.set_title(f"{table['title']} ({table['unit']})", loc="left", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
