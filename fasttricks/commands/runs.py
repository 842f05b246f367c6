"""List and compare runs: fasttricks runs [RUN or FOLDER ...] [--plot FILE.png] [--json]."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttricks.commands import prog
from fasttricks.config import ConfigError, UserError, show_name
from fasttricks.config.options import HELP, split_arguments
from fasttricks.runs.overview import Overview, differing_fields, find_runs, look_at
from fasttricks.system.extras import require_extra

PROG = prog("runs")
ABOUT = """List the runs in a folder, by default runs/, the newest first. Where two or more are named, also list the fields that
differ between their configs. --plot draws their curves in one picture."""
_LONGEST = 40  # characters of a field's value


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """How to show runs."""

    plot: str = ""
    """Picture to write, FILE.png: headline metric and training loss of each run by epoch. It must not exist."""
    json: bool = False
    """Print one line of JSON a run instead."""


def main(args: Sequence[str]) -> None:
    """Print the runs that `args` name."""
    from fasttricks.config.cli import parse

    places, options = split_arguments(args, RunsConfig, prog=f"{PROG} [RUN ...]")
    config = parse(RunsConfig(), options, prog=f"{PROG} [RUN ...]", description=ABOUT)
    if set(options) & set(HELP):
        return
    _check_plot(config.plot)
    runs = sorted(map(look_at, _folders(places or ["runs"])), key=lambda run: run.started, reverse=True)
    if config.json:
        print("\n".join(json.dumps(run.plain(), allow_nan=False) for run in runs))
    else:
        print("\n".join(listed(runs)))
        if len(places) > 1 and (rows := differing(runs)):
            print("\n".join(["", *rows]))
    if config.plot:
        _draw(runs, Path(config.plot))


def _folders(places: Sequence[str]) -> list[Path]:
    """The run folders that the places name or hold, each once. Raises UserError for a place without any."""
    found: dict[Path, None] = {}
    for place in places:
        try:
            folders = find_runs(Path(place))
        except OSError as error:
            raise UserError(f"runs = {place!r}: {error.strerror}; give a folder that you may read") from error
        if not folders:
            what = "holds no run" if Path(place).is_dir() else "is no folder"
            raise UserError(f"runs = {place!r}: {what}; give a run folder, or one that holds run folders")
        found |= dict.fromkeys(folders)
    return list(found)


def listed(runs: Sequence[Overview]) -> list[str]:
    """A line a run below a heading; columns as wide as they must be."""
    head = ["run", "recipe", "state", "epoch", "last", "", "best", "imgs/sec", "started"]
    return aligned([head, *map(_row, runs)])


def _row(run: Overview) -> list[str]:
    name = show_name(run.folder)
    if run.problem or run.config is None:
        return [name, show_name(run.problem)]
    headline, *others = run.metrics or ("",)
    second = (
        f"{show_name(others[0])} {run.last[others[0]]:.2f}" if others and run.last.get(others[0]) is not None else ""
    )
    best = f"{run.best[headline]:.2f} after {run.best['epoch']}" if run.best else ""
    return [
        name,
        show_name(run.config.recipe),
        run.state,
        f"{run.epoch} of {run.config.epochs}",
        f"{show_name(headline)} {run.last[headline]:.2f}" if run.last else "",
        second,
        best,
        f"{run.images_per_sec:,.0f}" if run.images_per_sec else "",
        run.started[:16].replace("T", " "),
    ]


def differing(runs: Sequence[Overview]) -> list[str]:
    """A line for each field that is not the same in all of the runs that can be read; empty where there is none."""
    known = [run for run in runs if run.config is not None]
    fields = differing_fields(known)
    if len(known) < 2:
        return []
    if not fields:
        return ["the configs are the same"]
    head = ["field", *(show_name(run.folder) for run in known)]
    return aligned([head, *([name, *map(_shown, values)] for name, values in fields.items())])


def _shown(value: Any) -> str:
    text = show_name("-" if value is None or value == "" else value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: each column as wide as its longest cell, but for the last of a row."""
    widths: dict[int, int] = {}
    for row in rows:
        for at, cell in enumerate(row[:-1]):
            widths[at] = max(widths.get(at, 0), len(cell))
    return [
        "  ".join([*(cell.ljust(widths[at]) for at, cell in enumerate(row[:-1])), row[-1]]).rstrip() for row in rows
    ]


def _check_plot(plot: str) -> None:
    """Raise ConfigError where the picture cannot be written."""
    if not plot:
        return
    file = Path(plot)
    if file.suffix != ".png":
        raise ConfigError(f"plot = {plot!r}: must end in .png; give another name")
    if file.exists():
        raise ConfigError(f"plot = {plot!r}: already exists and is never overwritten; give another name")
    if not file.parent.is_dir():
        raise ConfigError(f"plot = {plot!r}: {file.parent} is no folder; make it, or give another place")
    require_extra("train", ("matplotlib",), f"{PROG} --plot")


def _draw(runs: Sequence[Overview], file: Path) -> None:
    from fasttricks.runs.curves import draw_overlay

    shown = {show_name(run.folder): (run.metrics[0], run.rows) for run in runs if run.metrics}
    if not shown:
        raise UserError(f"plot = {str(file)!r}: no run has a validation yet; nothing was drawn")
    try:
        draw_overlay(shown).savefig(file, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"plot = {str(file)!r}: must be a place to write to ({error.strerror or error})") from error
    print(f"wrote {show_name(file)}")
