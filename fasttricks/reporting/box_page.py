"""The report of a detection as one HTML page: scores, curves, classes, and images with true and predicted boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasttricks.reporting.examples import Example, colors
from fasttricks.reporting.page import RunFacts, render, short, shown
from fasttricks.tasks.average_precision import BoxScores


@dataclass(frozen=True, kw_only=True)
class BoxFacts(RunFacts):
    """All that the page of a detection shows."""

    scores: BoxScores
    examples: Mapping[str, Sequence[Example]]
    """By kind, as examples.pick() has them; each has a picture of the true boxes and one of the predicted ones."""
    least_score: float
    """Score of a predicted box that is drawn, at least."""


def box_page(facts: BoxFacts) -> str:
    """The page; as page.page()."""
    rows = _class_rows(facts.scores, [short(name) for name in facts.classes])
    absent = len(facts.classes) - len(rows)
    least = f"{facts.least_score:g}"
    return render("boxes.html", facts, classes=rows, absent=absent, least_score=least, examples=shown(facts.examples))


def _class_rows(scores: BoxScores, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class with an object that counts, that of the lowest average precision by area first."""
    area, voc07, palette = scores.ap_area.tolist(), scores.ap_voc07.tolist(), colors(len(names))
    there = sorted((k for k in range(len(names)) if area[k] == area[k]), key=lambda k: area[k])
    return [
        {
            "name": names[k],
            "color": ", ".join(map(str, palette[k])),
            "voc07": f"{voc07[k]:.2f}",
            "area": f"{area[k]:.2f}",
            "objects": f"{scores.objects[k]:,}",
            "found": f"{scores.found[k]:,}",
            "detections": f"{scores.detections[k]:,}",
        }
        for k in there
    ]
