"""A table of an ablation as a PNG: the differences to the first row of each column, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttricks.ablation.cell_runs import CellRuns, by_column
from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import HEADLINE
from fasttricks.ablation.markdown import data_line, heading, score
from fasttricks.ablation.paper import Table
from fasttricks.ablation.statistics import CONFIDENCE, paired_difference


def plot(table: Table, cells: Sequence[CellRuns], config: AblateConfig, data: dict[str, Any], path: Path) -> None:
    """Differences to the first row, a panel a column: each seed, mean and interval; the paper's as hollow marks.

    Draws nothing where no two rows of any column have a run in common.
    """
    from matplotlib.figure import Figure

    columns = {
        name: column
        for name, column in by_column(cells).items()
        if column[0].scores() and any(runs.scores() for runs in column[1:])
    }
    if not columns:
        return
    rows = max(map(len, columns.values()))
    figure = Figure(figsize=(3.2 + 4.8 * len(columns), 1.9 + 0.45 * rows), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, (name, column) in zip(panels, columns.items(), strict=True):
        _panel(axes, name, column)
    figure.suptitle(f"{table.name}: {table.title}\n{data_line(cells, config, data)}", fontsize=9)
    figure.savefig(path, dpi=120)


def _panel(axes: Any, name: str, column: Sequence[CellRuns]) -> None:
    base = column[0]
    handles: dict[str, Any] = {}
    for row, runs in enumerate(column[1:], 1):
        handles |= _measured(axes, row, runs.scores(), base.scores())
        paper, before = runs.cell.paper, base.cell.paper
        if paper and before:
            at = (paper.values[HEADLINE.name] - before.values[HEADLINE.name], row + 0.22)
            handles["the paper, ImageNet"] = axes.plot(*at, "D", color="tab:orange", markerfacecolor="none")[0]
            axes.annotate(f"[{paper.marks[HEADLINE.name]}]", at, xytext=(6, -3), textcoords="offset points", fontsize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{runs.cell.row}\n{score(runs, HEADLINE) or 'not run'}" for runs in column]
    axes.set_yticks(range(len(column)), labels, fontsize=8)
    axes.set_ylim(len(column) - 0.4, -0.6)
    axes.set_title(heading(name, column), fontsize=9)
    axes.set_xlabel(f"{HEADLINE.label} less that of '{base.cell.row}', points", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    if axes.get_subplotspec().is_first_col():
        axes.figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)


def _measured(axes: Any, row: int, scores: dict[int, float], base: dict[int, float]) -> dict[str, Any]:
    """Draw the differences of a row, seed by seed, and their mean with its interval. Returns what to name in the legend."""
    difference = paired_difference(scores, base)
    if difference is None:
        return {}
    handles = {}
    single = [scores[seed] - base[seed] for seed in scores.keys() & base.keys()]
    handles["a seed"] = axes.plot(single, [row] * len(single), "|", color="tab:blue", markersize=9, alpha=0.6)[0]
    if difference.half_width is not None:
        measured = {"xerr": difference.half_width, "fmt": "o", "color": "tab:blue", "capsize": 4}
        handles[f"mean, {CONFIDENCE:.0%} interval"] = axes.errorbar([difference.mean], [row], **measured)
    return handles
