"""The tables of an ablation as Markdown, PNG and JSON: what was measured, the paper's figures beside it, and what is blank."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.paper import MARKS, Cell, Table
from fasttricks.ablation.statistics import CONFIDENCE, Difference, deviation, mean, paired_difference
from fasttricks.config import TrainConfig
from fasttricks.config.cli import arguments_of
from fasttricks.runs.folder import write_json


@dataclass(frozen=True)
class FilledCell:
    """A cell with the results of its finished runs by seed, and what is to be said of it."""

    cell: Cell
    config: TrainConfig | None
    """Of its first seed; None where it is not to be run."""
    results: dict[int, dict[str, Any]]
    notes: tuple[str, ...] = ()

    def scores(self, name: str = "top1") -> dict[int, float]:
        """Seed -> percent, without the runs that diverged."""
        return {seed: result[name] for seed, result in self.results.items() if name in result}

    @property
    def diverged(self) -> int:
        return sum("diverged" in result for result in self.results.values())


@dataclass(frozen=True)
class Filled:
    """A table and its cells, in its order."""

    table: Table
    cells: list[FilledCell]

    def column(self, name: str) -> list[FilledCell]:
        return [cell for cell in self.cells if cell.cell.column == name]


def write_report(tables: Sequence[Filled], config: AblateConfig, data: dict[str, Any], *, command: str) -> str:
    """Write TABLE.md and TABLE.png for each table and results.json into the ablation's folder. Returns the Markdown of all."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    texts = [markdown(filled, config, data, command=command) for filled in tables]
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that shared the runs end at once
        for filled, text in zip(tables, texts, strict=True):
            (folder / f"{filled.table.name}.md").write_text(text + "\n")
            plot(filled, config, data, folder / f"{filled.table.name}.png")
        write_json(folder / "results.json", raw(tables, data, command=command))
    names = ", ".join(f"{filled.table.name}.md and .png" for filled in tables)
    return "\n\n".join([*texts, f"written: {names}, results.json in {folder}/"])


def scale(filled: Filled, config: AblateConfig, data: dict[str, Any]) -> str:
    """Data set and scale in one line, for titles."""
    epochs = sorted({cell.config.epochs for cell in filled.cells if cell.config}) or [config.epochs]
    length = " or ".join(f"{n}" for n in epochs) + (" epoch" if epochs == [1] else " epochs")
    images = f"{data['train_images']:,} training and {data['val_images']:,} validation images"
    place = Path(data["root"]).name
    return f"{place}: {images} of {data['classes']} classes, {config.data.image_size} pixels, {length}, recipe {config.recipe}"


# --------------------------------------------------------------------------------------------------------- Markdown
def markdown(filled: Filled, config: AblateConfig, data: dict[str, Any], *, command: str) -> str:
    """The table with a section a column, what is blank and why, and how to read it."""
    lines = [f"## {filled.table.name}: {filled.table.title}", "", f"{scale(filled, config, data)}."]
    for name in filled.table.columns:
        lines += ["", *_column(name, filled.column(name))]
    if filled.table.factors:
        lines += ["", *_main_effects(filled)]
    notes: dict[tuple[str, str], list[str]] = {}
    for cell in filled.cells:
        for note in cell.notes:
            notes.setdefault((cell.cell.column, note), []).append(cell.cell.row)
    if notes:
        blank = [f"- {column}, {'; '.join(rows)}: {note}" for (column, note), rows in notes.items()]
        lines += ["", "Not run:", "", *blank]
    return "\n".join([*lines, "", *_how_to_read(filled, command)])


def heading(name: str, cells: list[FilledCell]) -> str:
    """The column's name, and what was trained in it."""
    batches = sorted({cell.config.global_batch_size for cell in cells if cell.config})
    models = list(dict.fromkeys(cell.config.model.name for cell in cells if cell.config))
    return f"{name}: {', '.join(models)}, batch {', '.join(map(str, batches))}" if models else f"{name}: not run"


def _column(name: str, cells: list[FilledCell]) -> list[str]:
    base = cells[0]
    heads = ["", "top-1", "top-5", "seeds", f"difference to {base.cell.row}", "", "s of training"]
    heads += ["the paper, top-1 / top-5", "its difference"] if base.cell.paper else []
    rows = [heads, ["---"] * len(heads), *(_row(cell, base) for cell in cells)]
    return [f"**{heading(name, cells)}**", "", *(f"| {' | '.join(row)} |".replace("|  ", "| ") for row in rows)]


def _row(cell: FilledCell, base: FilledCell) -> list[str]:
    seeds = f"{len(cell.scores())}" if cell.results else ""
    seeds += f", {cell.diverged} diverged" if cell.diverged else ""
    times = [result["train_seconds"] for result in cell.results.values() if "train_seconds" in result]
    seconds = f"{mean(times):,.0f}" if times else ""
    row = [cell.cell.row, score(cell, "top1"), score(cell, "top5"), seeds, *_compared(cell, base), seconds]
    paper, before = cell.cell.paper, base.cell.paper
    if before is None:
        return row
    change = "" if paper is None or cell is base else f"{paper.top1 - before.top1:+.2f}"
    return [*row, str(paper or ""), change]


def _compared(cell: FilledCell, base: FilledCell) -> tuple[str, str]:
    """(difference with its interval, verdict), empty for the baseline itself and where nothing was run."""
    difference = None if cell is base else paired_difference(cell.scores(), base.scores())
    if cell is not base and (cell.diverged or base.diverged):
        return "", "a run diverged: not judged"
    return ("", "") if difference is None else (spread(difference), difference.verdict)


def score(cell: FilledCell, name: str) -> str:
    """mean ± standard deviation over the seeds; blank where nothing was run."""
    values = list(cell.scores(name).values())
    if not values:
        return ""
    around = deviation(values)
    return f"{mean(values):.2f}" + ("" if around is None else f" ± {around:.2f}")


def spread(difference: Difference) -> str:
    """The mean difference with its interval, in points."""
    half = difference.half_width
    if half is None:
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} ({difference.mean - half:+.2f} to {difference.mean + half:+.2f})"


def _main_effects(filled: Filled) -> list[str]:
    """Each factor's effect over all others: the mean of the cells with it less that of the cells without, seed by seed."""
    lines = ["| main effect | points of top-1 | |", "|---|---|---|"]
    for factor in filled.table.factors:
        effect = main_effect(filled, factor)
        lines.append(f"| {factor} | {spread(effect)} | {effect.verdict} |" if effect else f"| {factor} | | |")
    return lines


def main_effect(filled: Filled, factor: str) -> Difference | None:
    """Of `factor` in a factorial design; None unless every cell has a seed in common with all others."""
    shared = (
        set.intersection(*(set(cell.scores()) for cell in filled.cells))
        if all(c.config for c in filled.cells)
        else set()
    )

    def average(on: bool) -> dict[int, float]:
        cells = [cell.scores() for cell in filled.cells if (factor in cell.cell.tricks) == on]
        return {seed: mean([scores[seed] for scores in cells]) for seed in shared}

    return paired_difference(average(True), average(False)) if shared else None


def _how_to_read(filled: Filled, command: str) -> list[str]:
    lines = [
        f"Mean ± standard deviation over seeds, percent. Differences are paired by seed, in points, with their {CONFIDENCE:.0%} "
        "t interval; real: it leaves 0 out. Each interval stands alone: one in twenty leaves 0 out by chance.",
    ]
    papers = [cell.cell.paper for cell in filled.cells if cell.cell.paper]
    shown = {mark for paper in papers for mark in (paper.mark, paper.top5_mark)}
    if shown:
        marks = "; ".join(f"[{mark}] {meaning}" for mark, meaning in MARKS.items() if mark in shown)
        lines += ["", f"The paper's figures are of ImageNet at its own scale: {marks}."]
    results = [result for cell in filled.cells for result in cell.results.values()]
    if results:
        commits = ", ".join(sorted({result["versions"]["commit"] for result in results}))
        seconds = sorted(result["cpu_seconds"] for result in results)
        devices = ", ".join(sorted({result["device"] for result in results if "device" in result}))
        spent = f"{seconds[0]:.0f} to {seconds[-1]:.0f} CPU seconds each"
        lines += ["", f"{len(results)} runs on {devices}, {spent}; commit {commits}."]
    return [*lines, "", f"    {command}"]


# ------------------------------------------------------------------------------------------------------------- JSON
def raw(tables: Sequence[Filled], data: dict[str, Any], *, command: str) -> dict[str, Any]:
    """Every finished run, by cell and seed, with the arguments of fasttricks.train that give it alone."""
    cells = [
        {
            "table": filled.table.name,
            "column": cell.cell.column,
            "row": cell.cell.row,
            "train": " ".join(arguments_of(replace(cell.config, run_dir=""))) if cell.config else None,
            "notes": cell.notes,
            "runs": {seed: _raw_run(result) for seed, result in cell.results.items()},
        }
        for filled in tables
        for cell in filled.cells
    ]
    return {"command": command, "data": data | {"root": Path(data["root"]).name}, "cells": cells}


def _raw_run(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("top1", "top5", "val_loss", "train_seconds", "cpu_seconds", "device", "ranks", "diverged")
    return {name: result[name] for name in kept if name in result} | {"commit": result["versions"]["commit"]}


# -------------------------------------------------------------------------------------------------------------- PNG
def plot(filled: Filled, config: AblateConfig, data: dict[str, Any], path: Path) -> None:
    """Differences to the first row, a panel a column: each seed, mean and interval; the paper's as hollow marks.

    Draws nothing where no two rows of any column have a run in common.
    """
    from matplotlib.figure import Figure

    columns = [filled.column(name) for name in filled.table.columns]
    names = [c[0].cell.column for c in columns if c[0].scores() and any(cell.scores() for cell in c[1:])]
    if not names:
        return
    rows = max(len(filled.column(name)) for name in names)
    figure = Figure(figsize=(3.2 + 4.8 * len(names), 1.9 + 0.45 * rows), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _panel(axes, name, filled.column(name))
    figure.suptitle(f"{filled.table.name}: {filled.table.title}\n{scale(filled, config, data)}", fontsize=9)
    figure.savefig(path, dpi=120)


def _panel(axes: Any, name: str, cells: list[FilledCell]) -> None:
    base = cells[0]
    handles: dict[str, Any] = {}
    for row, cell in enumerate(cells[1:], 1):
        difference = paired_difference(cell.scores(), base.scores())
        if difference is not None:
            single = [cell.scores()[seed] - base.scores()[seed] for seed in cell.scores().keys() & base.scores().keys()]
            handles["a seed"] = axes.plot(single, [row] * len(single), "|", color="tab:blue", markersize=9, alpha=0.6)[
                0
            ]
            if difference.half_width is not None:
                measured = {"xerr": difference.half_width, "fmt": "o", "color": "tab:blue", "capsize": 4}
                handles[f"mean, {CONFIDENCE:.0%} interval"] = axes.errorbar([difference.mean], [row], **measured)
        if cell.cell.paper and base.cell.paper:
            at = (cell.cell.paper.top1 - base.cell.paper.top1, row + 0.22)
            handles["the paper, ImageNet"] = axes.plot(*at, "D", color="tab:orange", markerfacecolor="none")[0]
            axes.annotate(f"[{cell.cell.paper.mark}]", at, xytext=(6, -3), textcoords="offset points", fontsize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{cell.cell.row}\n{score(cell, 'top1') or 'not run'}" for cell in cells]
    axes.set_yticks(range(len(cells)), labels, fontsize=8)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_title(heading(name, cells), fontsize=9)
    axes.set_xlabel(f"top-1 less that of '{base.cell.row}', points", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    if axes.get_subplotspec().is_first_col():
        axes.figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)
