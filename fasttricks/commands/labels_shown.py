"""The answers of evaluate for task multilabel: lines of a terminal, and values. docs/evaluation.md has the format. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fasttricks.config import show_name

if TYPE_CHECKING:
    from fasttricks.data.sources import Source
    from fasttricks.tasks.label_answers import LabelAnswered

_CLASSES = 10
"""Lines of classes on a terminal, at most."""


def labels_text(answers: LabelAnswered, classes: Sequence[str]) -> str:
    """The classes of the lowest average precision, in at most 14 lines."""
    rows = labels_table(answers, classes)["classes"]
    there = sorted((row for row in rows if row["images"]), key=lambda row: row["average_precision"])
    shown, rest = there[:_CLASSES], there[_CLASSES:]
    width = max(len("class"), *(len(show_name(row["name"])) for row in shown)) if shown else 0
    lines = [f"{'class':{width}}  {'AP':>8}  precision    recall        F1  images"] if shown else []
    for row in shown:
        shares = "  ".join(_percent(row[name]) for name in ("average_precision", "precision", "recall", "f1"))
        lines.append(f"{show_name(row['name']):{width}}  {shares}  {row['images']:6,}")
    if rest:
        lowest = 100 * rest[0]["average_precision"]
        lines.append(f"{len(rest):,} more classes, of AP {lowest:.2f} % and above; --output FILE.json has them")
    if absent := len(rows) - len(there):
        lines.append(f"{absent:,} of {len(rows):,} classes are in no image here; mAP leaves them out")
    if answers.undecided:
        lines.append(f"{answers.undecided:,} logits are NaN; they count as wrong")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{'-':>8}" if math.isnan(share) else f"{100 * share:6.2f} %"


def labels_table(answers: LabelAnswered, classes: Sequence[str], images: Source | None = None) -> dict[str, Any]:
    """All answers as plain values; docs/evaluation.md names them. A number that is not finite is NaN here, null in the file."""
    columns = {
        "name": list(classes),
        "images": answers.positives.tolist(),
        "predicted": answers.predicted.tolist(),
        "right": answers.right.tolist(),
        "average_precision": answers.average_precision.tolist(),
        "precision": answers.precision.tolist(),
        "recall": answers.recall.tolist(),
        "f1": answers.f1.tolist(),
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"undecided": answers.undecided, "classes": rows}
