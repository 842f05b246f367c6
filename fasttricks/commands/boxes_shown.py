"""The scores of a detection: as lines of a terminal, and whole for JSON. docs/transfer.md has the format. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fasttricks.config import show_name

if TYPE_CHECKING:
    from fasttricks.data.sources import Source
    from fasttricks.tasks.average_precision import BoxScores

_CLASSES = 20
"""Lines of classes on a terminal, at most."""


def boxes_text(scores: BoxScores, classes: Sequence[str]) -> str:
    """Both average precisions of each class, the lowest first, with its objects and those found; in at most 22 lines."""
    voc07, area = scores.ap_voc07.tolist(), scores.ap_area.tolist()
    shown = [show_name(name) for name in classes]
    there = sorted((k for k in range(len(shown)) if area[k] == area[k]), key=lambda k: area[k])
    rows = there[:_CLASSES]
    width = max(len("class"), *(len(shown[k]) for k in rows))
    lines = [f"{'class':{width}}  AP, 11 recalls  AP, area  found of objects  detections"]
    lines += [
        f"{shown[k]:{width}}  {voc07[k]:12.2f} %  {area[k]:6.2f} %  {f'{scores.found[k]:,} of {scores.objects[k]:,}':>16}  "
        f"{scores.detections[k]:10,}"
        for k in rows
    ]
    if more := len(there) - len(rows):
        lines.append(f"{more:,} more classes, of {area[there[_CLASSES]]:.2f} % and above; --output FILE.json has them")
    if absent := len(shown) - len(there):
        lines.append(f"{absent:,} of {len(shown):,} classes have no object that counts here, and are in no mean")
    return "\n".join(lines)


def boxes_table(scores: BoxScores, classes: Sequence[str], images: Source | None = None) -> dict[str, Any]:
    """All scores as plain values. The average precision of a class without objects is NaN here, null in the file."""
    columns = (scores.ap_voc07, scores.ap_area, scores.objects, scores.found, scores.detections)
    names = ("name", "ap_voc07", "ap_area", "objects", "found", "detections")
    rows = zip(classes, *(column.tolist() for column in columns), strict=True)
    return {"classes": [dict(zip(names, row, strict=True)) for row in rows]}
