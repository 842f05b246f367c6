"""The report of a segmentation as one HTML page: scores, curves, classes, confusion and images with their predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttricks.reporting.charts import heat_map
from fasttricks.reporting.examples import Example, colors
from fasttricks.reporting.page import PAIRS, TABLE_CLASSES, RunFacts, render, short, shown
from fasttricks.tasks.pixel_counts import PixelScores


@dataclass(frozen=True, kw_only=True)
class PixelFacts(RunFacts):
    """All that the page of a segmentation shows."""

    scores: PixelScores
    examples: Mapping[str, Sequence[Example]]
    """By kind, as examples.pick() has them."""


def pixel_page(facts: PixelFacts) -> str:
    """The page; as page.page()."""
    names, confusion = [short(name) for name in facts.classes], facts.scores.confusion
    few = len(names) <= TABLE_CLASSES
    rows = _class_rows(facts.scores, names)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    return render(
        "pixels.html",
        facts,
        classes=rows,
        absent=len(names) - len(rows),
        matrix=_matrix(shares.tolist()) if few else None,
        matrix_names=names if few else [],
        heat="" if few else heat_map(confusion),
        pairs=[] if few else _pairs(facts.scores, names),
        examples=shown(facts.examples),
    )


def _class_rows(scores: PixelScores, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class that has an IoU, the lowest first."""
    confusion, iou = scores.confusion, scores.iou.tolist()
    total, true, found = max(1, int(confusion.sum())), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    right, wrong, palette = confusion.diagonal().tolist(), confusion.copy(), colors(len(names))
    np.fill_diagonal(wrong, 0)
    taken = wrong.argmax(1).tolist()
    there = sorted((k for k in range(len(names)) if iou[k] == iou[k]), key=lambda k: iou[k])
    return [
        {
            "name": names[k],
            "color": ", ".join(map(str, palette[k])),
            "iou": f"{iou[k]:.2f}",
            "recall": f"{100 * right[k] / true[k]:.2f} %" if true[k] else "",
            "true": f"{100 * true[k] / total:.2f} %",
            "found": f"{100 * found[k] / total:.2f} %",
            "taken": names[taken[k]] if wrong[k, taken[k]] else "",
            "times": f"{100 * int(wrong[k, taken[k]]) / max(1, true[k]):.1f} %",
        }
        for k in there
    ]


def _matrix(shares: Sequence[Sequence[float]]) -> list[list[tuple[str, str]]]:
    """Rows of (% of the row's pixels, the strength of a colour)."""
    return [[(f"{100 * x:.1f}" if x >= 0.0005 else "", f"{0.75 * math.sqrt(x):.2f}") for x in row] for row in shares]


def _pairs(scores: PixelScores, names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    wrong, true = scores.confusion.copy(), scores.confusion.sum(1)
    np.fill_diagonal(wrong, 0)
    order = (-wrong).argsort(axis=None, kind="stable")[:PAIRS]
    cells = [divmod(int(cell), len(names)) for cell in order]
    return [(names[t], names[p], f"{wrong[t, p]:,}", f"{true[t]:,}") for t, p in cells if wrong[t, p]]
