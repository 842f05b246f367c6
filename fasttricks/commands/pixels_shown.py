"""The scores of a segmentation: as lines of a terminal, and whole for JSON. docs/transfer.md has the format. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fasttricks.config import show_name

if TYPE_CHECKING:
    from fasttricks.data.sources import Source
    from fasttricks.tasks.pixel_counts import PixelScores

_CLASSES = 20
"""Lines of classes on a terminal, at most."""


def pixels_text(scores: PixelScores, classes: Sequence[str]) -> str:
    """The IoU of each class, the lowest first, with its share of the pixels; in at most 22 lines."""
    iou, pixels = scores.iou.tolist(), scores.confusion.sum(1)
    share = (100 * pixels / max(1, pixels.sum())).tolist()
    shown = [show_name(name) for name in classes]
    there = sorted((k for k in range(len(shown)) if iou[k] == iou[k]), key=lambda k: iou[k])
    rows = there[:_CLASSES]
    width = max(len("class"), *(len(shown[k]) for k in rows))
    lines = [f"{'class':{width}}      IoU  pixels"]
    lines += [f"{shown[k]:{width}}  {iou[k]:5.2f} %  {share[k]:4.1f} %" for k in rows]
    if more := len(there) - len(rows):
        lines.append(f"{more:,} more classes, of {iou[there[_CLASSES]]:.2f} % and above; --output FILE.json has them")
    if absent := len(shown) - len(there):
        lines.append(f"{absent:,} of {len(shown):,} classes have no pixel here, and none is taken for one")
    return "\n".join(lines)


def pixels_table(scores: PixelScores, classes: Sequence[str], images: Source | None = None) -> dict[str, Any]:
    """All scores as plain values. An IoU of a class without pixels is NaN here, null in the file."""
    pixels, found = scores.confusion.sum(1).tolist(), scores.confusion.diagonal().tolist()
    return {
        "classes": [
            {"name": name, "iou": iou, "pixels": count, "right": right}
            for name, iou, count, right in zip(classes, scores.iou.tolist(), pixels, found, strict=True)
        ],
        "confusion": scores.confusion.tolist(),
    }
