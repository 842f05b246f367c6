"""python -m bench.compare OLD NEW: whether NEW is slower than OLD, two JSON files of make bench. Exit code 1 where it is.

Compared are the ratios to each peer: both were measured in one call, in alternation, so that a machine that was busier or
clocked lower that day is the same for both. Rates are shown, and decide nothing. A ratio counts as lost where its median is
more than the tolerance lower and every round of NEW is below the median of OLD.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fasttricks.config import UserError
from fasttricks.system.command import run_main

TOLERANCE = 0.05


class Change(NamedTuple):
    """A contestant in both files."""

    table: str
    name: str
    old: dict[str, Any]
    new: dict[str, Any]

    @property
    def change(self) -> float:
        """Change of the ratio fasttricks / contestant: 0 is none, -0.1 is a tenth lost."""
        return float(self.new["ratio"] / self.old["ratio"] - 1)

    def lost(self, tolerance: float) -> bool:
        """Whether NEW is slower beside this contestant, beyond tolerance and noise."""
        return self.change < -tolerance and bool(self.new["ratio_high"] < self.old["ratio"])


def read(path: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(table, contestant) -> its row, our own rows aside. Raises UserError for a file that is no result of make bench."""
    try:
        result = json.loads(Path(path).read_text())
        tables = [table for part in result["tables"].values() for table in part]
        return {(table["title"], row["name"]): row for table in tables for row in table["rows"][1:]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = "must be a JSON file that make bench wrote"
        raise UserError(
            f"{path}: {rule} ({type(error).__name__}: {error}); measure it again with make bench"
        ) from error


def compare(old_path: str, new_path: str) -> tuple[list[Change], list[tuple[str, str]]]:
    """The rows that both files have, and those of only one. Raises UserError where they have nothing in common."""
    old, new = read(old_path), read(new_path)
    changes = [Change(*key, old[key], new[key]) for key in old if key in new]
    if not changes:
        rule = "have no contestant of a table in common: measure both with the same options, on the same kind of device"
        raise UserError(f"{old_path}, {new_path}: {rule}")
    return changes, sorted(set(old) ^ set(new))


def show(console: Console, changes: Sequence[Change], alone: Sequence[tuple[str, str]], tolerance: float) -> None:
    """Print the comparison."""
    out = Table("", "beside", "old ratio", "new ratio", "change", "")
    for change in changes:
        verdict = "SLOWER" if change.lost(tolerance) else ""
        ratios = [
            f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
            for row in (change.old, change.new)
        ]
        out.add_row(change.table, change.name, *ratios, f"{change.change:+.1%}", verdict)
    console.print(out)
    for table, name in alone:
        console.print(f"in one of the files only, not compared: {table}: {name}", highlight=False)


def main(args: Sequence[str]) -> None:
    """Compare two files; exits 1 where NEW is slower."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", help="JSON file of an earlier make bench")
    parser.add_argument("new", help="JSON file of a later one")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="loss of a ratio that is let pass; 0.05: 5 %%"
    )
    options = parser.parse_args(args)
    if not 0 <= options.tolerance < 1:
        raise UserError(f"tolerance = {options.tolerance}: must be 0 or more and below 1")
    changes, alone = compare(options.old, options.new)
    show(Console(), changes, alone, options.tolerance)
    lost = [change for change in changes if change.lost(options.tolerance)]
    print(f"{len(lost)} of {len(changes)} ratios lost more than {options.tolerance:.0%} beyond noise")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    run_main(main)
