"""A table of an ablation as a PNG: the differences to the first row of each column, beside the paper's."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttricks.ablation.cell_runs import CellRuns, by_column
from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import metrics_of, resolution
from fasttricks.ablation.markdown import data_line, heading, score
from fasttricks.ablation.paper import PAPERS_DATA, Table
from fasttricks.ablation.statistics import CONFIDENCE, MIN_SEEDS, paired_difference
from fasttricks.runs.curves import literal

LETTERS_AN_INCH = 14
"""Letters of a title in an inch, so that titles are broken where the figure ends."""
WORSE, BETTER = "\N{LEFTWARDS ARROW} worse", "better \N{RIGHTWARDS ARROW}"


def plot(table: Table, cells: Sequence[CellRuns], config: AblateConfig, data: dict[str, Any], path: Path) -> bool:
    """Differences to the first row, a panel a column: each seed, mean and interval; the paper's as hollow diamonds.

    Draws nothing where no two rows of any column have a run in common. Returns whether it drew.
    """
    from matplotlib.figure import Figure

    columns = {
        name: column
        for name, column in by_column(cells).items()
        if column[0].scores() and any(runs.scores() for runs in column[1:])
    }
    if not columns:
        return False
    rows = max(map(len, columns.values()))
    width = 3.2 + 4.8 * len(columns)
    figure = Figure(figsize=(width, 2.1 + 0.45 * rows), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (name, column) in zip(panels, columns.items(), strict=True):
        handles |= _panel(axes, name, column, config, resolution(config, data))
    titles = (f"{table.name}: {table.title}", data_line(cells, config, data))
    title = "\n".join(textwrap.fill(line, int(width * LETTERS_AN_INCH)) for line in titles)
    figure.suptitle(literal(title), fontsize=9)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3 if width > 10 else 2, fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def _panel(axes: Any, name: str, column: Sequence[CellRuns], config: AblateConfig, step: float) -> dict[str, Any]:
    """Draw a column. Returns the entries of the legend."""
    base, (headline, *_) = column[0], metrics_of(config)
    axes.axvline(0, color="black", linewidth=0.8)
    handles = {"compared with": axes.plot(0, 0, "ks", markersize=5)[0]}
    for row, runs in enumerate(column[1:], 1):
        handles |= _measured(axes, row, runs.scores(), base.scores())
        paper, before = runs.cell.paper, base.cell.paper
        if paper and before:
            at = (paper.values[headline.name] - before.values[headline.name], row + 0.22)
            handles[f"the paper, {PAPERS_DATA[config.task]}"] = axes.plot(
                *at, "D", color="tab:orange", markerfacecolor="none"
            )[0]
            axes.annotate(f"[{paper.marks[headline.name]}]", at, xytext=(6, -3), textcoords="offset points", fontsize=7)
    least = max(1.0, 5 * step)  # two seeds that lie close together do not fill the axis
    low, high = axes.get_xlim()
    axes.set_xlim(low := min(low, -least), high := max(high, least))
    if step > 0.005 * (high - low):  # it can be seen
        image = axes.axvspan(-step, step, color="lightgray", alpha=0.7, linewidth=0, zorder=0)
        handles["one validation image"] = image
    labels = [f"{runs.cell.row}\n{score(runs) or 'not run'}" for runs in column]
    axes.set_yticks(range(len(column)), labels, fontsize=8)
    axes.set_ylim(len(column) - 0.4, -0.6)
    axes.set_title(textwrap.fill(heading(name, column), 5 * LETTERS_AN_INCH), fontsize=9)
    axes.set_xlabel(f"{WORSE}     {headline.label} less that of '{base.cell.row}', points     {BETTER}", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    return handles


def _measured(axes: Any, row: int, scores: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
    """Draw the differences of a row, seed by seed, and their mean with its interval. Returns the entries of the legend."""
    difference = paired_difference(scores, base, 0.0)
    if difference is None:
        return {}
    handles = {}
    single = [scores[seed] - base[seed] for seed in scores.keys() & base.keys()]
    handles["a seed"] = axes.plot(single, [row] * len(single), "|", color="tab:blue", markersize=11, alpha=0.8)[0]
    half, mean = difference.half_width, difference.mean
    if half is not None:
        measured = {"xerr": half, "fmt": "o", "color": "tab:blue", "capsize": 4}
        handles[f"mean, {CONFIDENCE:.0%} interval"] = axes.errorbar([mean], [row], **measured)
    elif len(single) > 1:
        why = f"mean, no interval: below {MIN_SEEDS} seeds or no spread"
        handles[why] = axes.plot(mean, row, "o", color="tab:blue", markerfacecolor="none")[0]
    return handles
