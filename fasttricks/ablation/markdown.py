"""A table of an ablation in Markdown: measurements beside the paper's figures, reasons for blanks, how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasttricks.ablation.cell_runs import CellRuns, by_column
from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import metrics_of, resolution
from fasttricks.ablation.paper import MARKS, PAPERS_DATA, Table
from fasttricks.ablation.statistics import CONFIDENCE, MIN_SEEDS, REAL, Difference, deviation, mean, paired_difference
from fasttricks.config import get_at, show_classes, show_name
from fasttricks.runs.metric import Metric


def markdown(
    table: Table, cells: Sequence[CellRuns], config: AblateConfig, data: dict[str, Any], *, command: str
) -> str:
    """The table with a section a column, the reasons for blanks, and how to read it."""
    lines = [f"## {table.name}: {table.title}", "", f"{data_line(cells, config, data)}."]
    step = resolution(config, data)
    # the paper's figures are of ImageNet, of 1000 classes
    labels = {metric.name: metric.label for metric in metrics_of(config, 1000)}
    for name, column in by_column(cells).items():
        lines += ["", *_column(name, column, metrics_of(config, data["classes"]), step, labels)]
    if table.factors:
        lines += ["", *_main_effects(table.factors, cells, step)]
    notes: dict[tuple[str, str], list[str]] = {}
    for runs in cells:
        for note in runs.notes:
            notes.setdefault((runs.cell.column, note), []).append(runs.cell.row)
    if notes:
        blank = [f"- {column}, {'; '.join(rows)}: {note}" for (column, note), rows in notes.items()]
        lines += ["", "Not run:", "", *blank]
    return "\n".join([*lines, "", *_how_to_read(cells, config, command)])


def data_line(cells: Sequence[CellRuns], config: AblateConfig, data: dict[str, Any]) -> str:
    """Data set, image size and length of training in one line, for titles."""
    epochs = sorted({runs.config.epochs for runs in cells if runs.config}) or [config.epochs]
    length = " or ".join(f"{n}" for n in epochs) + (" epoch" if epochs == [1] else " epochs")
    split = "validation" if config.split == "val" else config.split
    images = f"{data['train_images']:,} training and {data[f'{config.split}_images']:,} {split} images"
    place = show_name(Path(data["root"]).name)
    side = get_at(config, {"detection": "detect.base_size"}.get(config.task, "data.image_size"))
    return f"{place}: {images} of {show_classes(data['classes'])}, {side} pixels, {length}, recipe {config.recipe}"


def heading(name: str, column: Sequence[CellRuns]) -> str:
    """The column's name, and its networks and batch."""
    batches = sorted({runs.config.global_batch_size for runs in column if runs.config})
    models = list(dict.fromkeys(runs.config.model.name for runs in column if runs.config))
    return f"{name}: {', '.join(models)}, batch {', '.join(map(str, batches))}" if models else f"{name}: not run"


def score(runs: CellRuns, metric: Metric | None = None) -> str:
    """mean ± standard deviation over the seeds; blank where nothing was run. metric: None: the headline."""
    values = list(runs.scores(metric).values())
    if not values:
        return ""
    around = deviation(values)
    return f"{mean(values):.2f}" + ("" if around is None else f" ± {around:.2f}")


def _column(
    name: str, column: Sequence[CellRuns], metrics: Sequence[Metric], step: float, labels: Mapping[str, str]
) -> list[str]:
    base = column[0]
    figures = next((runs.cell.paper for runs in column if runs.cell.paper), None)
    heads = ["", *(metric.label for metric in metrics), "seeds", f"difference to {base.cell.row}", "", "s of training"]
    if figures:
        heads += [f"the paper, {' / '.join(labels[name] for name in figures.values)}", "its difference"]
    rows = [heads, ["---"] * len(heads), *(_row(runs, base, metrics, step, figures is not None) for runs in column)]
    return [f"**{heading(name, column)}**", "", *(f"| {' | '.join(row)} |".replace("|  ", "| ") for row in rows)]


def _row(runs: CellRuns, base: CellRuns, metrics: Sequence[Metric], step: float, papers: bool) -> list[str]:
    seeds = f"{len(runs.scores())}" if runs.results else ""
    seeds += f", {runs.diverged} diverged" if runs.diverged else ""
    times = [result["train_seconds"] for result in runs.results.values() if "train_seconds" in result]
    seconds = f"{mean(times):,.0f}" if times else ""
    scores = [score(runs, metric) for metric in metrics]
    row = [runs.cell.row, *scores, seeds, *_compared(runs, base, step), seconds]
    paper, before = runs.cell.paper, base.cell.paper
    if not papers:
        return row
    name = metrics[0].name
    change = f"{paper.values[name] - before.values[name]:+.2f}" if paper and before and runs is not base else ""
    return [*row, str(paper or ""), change]


def _compared(runs: CellRuns, base: CellRuns, step: float) -> tuple[str, str]:
    """(difference with its interval, verdict), empty for the baseline itself and where nothing was run."""
    if runs is base:
        return "", ""
    if runs.diverged or base.diverged:
        return "", "a run diverged: not judged"
    difference = paired_difference(runs.scores(), base.scores(), step)
    return (_spread(difference), difference.verdict) if difference else ("", "")


def _spread(difference: Difference) -> str:
    """The mean difference with its interval, in points."""
    half = difference.half_width
    if half is None:
        return f"{difference.mean:+.2f}"
    return f"{difference.mean:+.2f} ({difference.mean - half:+.2f} to {difference.mean + half:+.2f})"


def _main_effects(factors: Sequence[str], cells: Sequence[CellRuns], step: float) -> list[str]:
    """Each factor's effect over all others: the mean of the cells with it less that of the cells without, seed by seed."""
    label = next((runs.jobs[0].headline.label for runs in cells if runs.jobs), "the headline")
    lines = [f"| main effect | points of {label} | |", "|---|---|---|"]
    for factor in factors:
        effect = _main_effect(factor, cells, step)
        lines.append(f"| {factor} | {_spread(effect)} | {effect.verdict} |" if effect else f"| {factor} | | |")
    return lines


def _main_effect(factor: str, cells: Sequence[CellRuns], step: float) -> Difference | None:
    """The main effect of `factor` in a factorial design; None unless all cells have a seed in common."""
    scores = [runs.scores() for runs in cells]
    shared = set.intersection(*map(set, scores)) if all(runs.jobs for runs in cells) else set()

    def average(on: bool) -> dict[int, float]:
        chosen = [own for own, runs in zip(scores, cells, strict=True) if (factor in runs.cell.tricks) == on]
        return {seed: mean([own[seed] for own in chosen]) for seed in shared}

    return paired_difference(average(True), average(False), step)


def _how_to_read(cells: Sequence[CellRuns], config: AblateConfig, command: str) -> list[str]:
    within = ", or a mean of at most one validation image" if config.task == "classification" else ""
    same = ", a difference" if within else " or a difference"
    lines = [
        f"Mean ± standard deviation over seeds, percent. Differences are paired by seed, in points, with their {CONFIDENCE:.0%} "
        f"t interval; {REAL}: it leaves 0 out. Each interval stands alone: one in twenty leaves 0 out by chance. Not judged: "
        f"fewer than {MIN_SEEDS} seeds{same} that is the same in every seed{within}.",
    ]
    shown = {mark for runs in cells if runs.cell.paper for mark in runs.cell.paper.marks.values()}
    if shown:
        marks = "; ".join(f"[{mark}] {meaning}" for mark, meaning in MARKS.items() if mark in shown)
        lines += ["", f"The paper's figures are of {PAPERS_DATA[config.task]} at its own scale: {marks}."]
    results = [result for runs in cells for result in runs.results.values()]
    if results:
        commits = ", ".join(sorted({result["versions"]["commit"] for result in results}))
        seconds = sorted(result["cpu_seconds"] for result in results)
        devices = ", ".join(sorted({result["device"] for result in results if "device" in result}))
        least, most = f"{seconds[0]:.0f}", f"{seconds[-1]:.0f}"
        spent = f"{least if least == most else f'{least} to {most}'} CPU seconds each"
        lines += ["", f"{len(results)} runs on {devices}, {spent}; commit {commits}."]
    return [*lines, "", f"    {command}"]
