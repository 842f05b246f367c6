"""The results of an ablation beside its runs: a Markdown and a PNG of each table, and results.json with every finished run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fasttricks.ablation.cell_runs import CellRuns, Plan
from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import metrics_of
from fasttricks.ablation.markdown import markdown
from fasttricks.ablation.plot import plot
from fasttricks.config.cli import arguments_of
from fasttricks.runs.folder import write_json
from fasttricks.system.ownership import Claim

_KEPT = ("val_loss", "train_seconds", "cpu_seconds", "device", "ranks", "diverged")
"""The keys of a run's result.json that results.json keeps, besides the metrics and the commit."""


def write_report(plan: Plan, config: AblateConfig, data: dict[str, Any], *, command: str) -> str:
    """Write TABLE.md and TABLE.png for each table and results.json into the ablation's folder. Returns the Markdown of all.

    plan: with its results read. Draws no TABLE.png where no two rows of a column have a run in common.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    texts = [markdown(table, cells, config, data, command=command) for table, cells in plan]
    with Claim(folder / ".lock", patience_s=math.inf):  # processes that shared the runs end at once
        for (table, cells), text in zip(plan, texts, strict=True):
            (folder / f"{table.name}.md").write_text(text + "\n", "utf-8")
            picture = plot(table, cells, config, data, folder / f"{table.name}.png")
            written.append(f"{table.name}.md{' and .png' if picture else ''}")
        kept = (*(metric.name for metric in metrics_of(config, data["classes"])), *_KEPT)
        finished = [_cell(table.name, runs, kept, folder) for table, cells in plan for runs in cells]
        shown = data | {"root": Path(data["root"]).name}
        write_json(folder / "results.json", {"command": command, "data": shown, "cells": finished})
    return "\n\n".join([*texts, f"written: {', '.join(written)}, results.json in {folder}/"])


def _cell(table: str, runs: CellRuns, kept: Sequence[str], folder: Path) -> dict[str, Any]:
    """The finished runs of a cell by seed, their place in `folder`, and the arguments of fasttricks.train for the first alone."""
    return {
        "table": table,
        "column": runs.cell.column,
        "row": runs.cell.row,
        "folder": str(runs.jobs[0].folder.parent.relative_to(folder)) if runs.jobs else "",
        "train": " ".join(arguments_of(replace(runs.config, run_dir=""))) if runs.config else None,
        "notes": runs.notes,
        "runs": {seed: _run(result, kept) for seed, result in runs.results.items()},
    }


def _run(result: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    return {name: result[name] for name in kept if name in result} | {"commit": result["versions"]["commit"]}
