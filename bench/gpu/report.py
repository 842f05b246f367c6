"""The two files of make gpu: JSON with all, Markdown to read. Each is rewritten whole, so a run cut short keeps both."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu.parts import CARD, PARTS, Row
from bench.gpu.runner import Outcome
from fasttricks.system.files import temporary_of, write_whole

WALK = "**A walk on the CPU: it shows that each part runs at tiny shapes. No figure here is one of a GPU.**"
_TITLES = {part.name: part.title for part in PARTS}


def write(folder: Path, name: str, head: dict[str, Any], outcomes: dict[str, Outcome]) -> None:
    """Write NAME.json and NAME.md into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {part: dataclasses.asdict(outcome) for part, outcome in outcomes.items()}
    pages = {
        folder / f"{name}.json": json.dumps({**head, "parts": parts}, indent=1) + "\n",
        folder / f"{name}.md": markdown(head, outcomes),
    }
    for path, text in pages.items():
        write_whole(path, text.encode(), temporary_of(path))


def markdown(head: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """The page: a table and the errors of each part, in order."""
    lines = [f"# make gpu: {head['card']}", ""]
    lines += [WALK, ""] if head["device"] == "cpu" else []
    lines += [f"{head['started']}, commit {head['commit']}, {head['seconds']:.0f} s of {head['budget_s']:.0f} s.", ""]
    for name, outcome in outcomes.items():
        lines += [section(name, outcome), ""]
    return "\n".join(lines)


def section(name: str, outcome: Outcome) -> str:
    """One part of the page."""
    reason = f": {outcome.reason}" if outcome.reason else ""
    lines = [f"## {_TITLES.get(name, name)}", "", f"`{name}` {outcome.status}{reason}, {outcome.seconds:.0f} s.", ""]
    lines += table(outcome.rows)
    for error in outcome.errors:
        lines += ["", "```", error.replace("```", "'''"), "```"]
    return "\n".join(lines)


def table(rows: list[Row]) -> list[str]:
    """The rows, each with the columns that any of them has, in the order in which these first come."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return []
    cells = [
        [_cell(row.get(column, "")) if column != "error" else _last_line(row) for column in columns] for row in rows
    ]
    return [_line(columns), _line("---" for _ in columns), *map(_line, cells)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _last_line(row: Row) -> str:
    return _cell(str(row.get("error", "")).strip().rpartition("\n")[2][:200])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value).replace("|", "\\|").replace("\n", " ")


def card_of(outcomes: dict[str, Outcome]) -> str:
    """The name of the card, as the first part has it; empty before."""
    rows = outcomes[CARD].rows if CARD in outcomes else []
    return next((str(row["value"]) for row in rows if row.get("name") == CARD), "")


def file_name(card: str) -> str:
    """That of the results of a card: letters and digits alone."""
    return "gpu-" + re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-")
