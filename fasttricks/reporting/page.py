"""The report of a checkpoint as one HTML page, from its answers and its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fasttricks.config import flatten, show_name
from fasttricks.data.sources import Source
from fasttricks.data.sources.decode import BadImage, decode
from fasttricks.data.sources.errors import why_unreadable
from fasttricks.reporting.charts import Line, data_uri, heat_map, line_chart, reliability_chart
from fasttricks.reporting.examples import Example, strip
from fasttricks.runs.calibration import Calibration
from fasttricks.runs.epochs import LOSS, PART
from fasttricks.tasks.answers import Answered

TABLE_CLASSES = 30
"""Classes up to which the confusion matrix is a table of numbers; above it is a picture."""
PAIRS, _BAD, _LONGEST = 25, 200, 200
_SIDE, _QUALITY = 160, 80
"""Pixels of a thumbnail's longer side, and its JPEG quality: about 5 KB."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The facts that the page of every task shows."""

    name: str
    subtitle: str
    headline: Sequence[tuple[str, str]]
    """Label and value of each figure at the top."""
    notes: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    """A row an epoch, as of metrics.csv; empty where they are not known."""
    metrics: Sequence[str]
    """The names of the scores in `rows`, the headline first."""
    no_curves: str
    """Why there are no rows."""
    classes: Sequence[str]
    bad: Mapping[str, str]
    """Images that could not be used, by name, and why."""
    config: Mapping[str, Any]
    """As nested tables."""
    config_text: str
    recipe: Mapping[str, Any] | None
    """The recipe's config; None: not known here."""
    command: str
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Facts(RunFacts):
    """All that the page of a classifier shows."""

    answers: Answered
    images: Source
    max_pixels: int
    train_counts: Sequence[int] | None
    """Training images of each class; None: not known."""
    calibration: Calibration | None


def page(facts: Facts) -> str:
    """The page; as render().

    Reads the images of the mistakes, 50 at most. Its size does not grow with the images: tests/test_report.py holds it under
    15 MB for 500 classes and 100,000 images.
    """
    answers, names = facts.answers, [short(name) for name in facts.classes]
    classes = _class_rows(facts, names)
    small = len(names) <= TABLE_CLASSES
    return render(
        "page.html",
        facts,
        bins=len(answers.bin_count),
        reliability=Markup(  # numbers and the program's own words
            reliability_chart(answers.bin_count.tolist(), answers.bin_right.tolist(), answers.bin_confidence.tolist())
        ),
        calibration=_calibration(facts),
        classes=classes,
        absent=len(names) - len(classes),
        counted=facts.train_counts is not None,
        matrix=_matrix(answers) if small else None,
        matrix_names=names if small else [],
        heat="" if small else heat_map(answers.confusion),
        pairs=[] if small else _pairs(answers, names),
        mistakes=[_mistake(facts, names, number) for number in range(len(answers.mistakes.images))],
    )


def render(file: str, facts: RunFacts, **own: Any) -> str:
    """The page of the template `file`, which has `own` too.

    Every name is escaped, by the template and by show_name; the page has no script and loads nothing.
    """
    loader = jinja2.PackageLoader("fasttricks.reporting", "")
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return pages.get_template(file).render(
        **own,
        name=short(facts.name),
        subtitle=short(facts.subtitle),
        headline=facts.headline,
        notes=[short(note) for note in facts.notes],
        curves=_curves(facts),
        no_curves=facts.no_curves,
        bad=[(short(file), short(why)) for file, why in list(facts.bad.items())[:_BAD]],
        more_bad=max(0, len(facts.bad) - _BAD),
        changed=_changed(facts),
        recipe_known=facts.recipe is not None,
        config="\n".join(map(show_name, facts.config_text.split("\n"))),
        command=short(facts.command, 10_000),
        versions=sorted((short(package), short(version)) for package, version in facts.versions.items()),
    )


def short(text: object, longest: int = _LONGEST) -> str:
    """`text` as one line without control characters, cut where it is very long."""
    shown = show_name(text)
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def shown(examples: Mapping[str, Sequence[Example]]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """By kind: the name, the score and the pictures of each image, as a page shows them."""
    return [(kind, [(short(one.name), short(one.told), strip(one)) for one in some]) for kind, some in examples.items()]


def _curves(facts: RunFacts) -> list[tuple[str, Markup, list[str]]]:
    rows, found = facts.rows, []
    parts = dict.fromkeys(name for row in rows for name in row if name.startswith(PART))
    charts = (
        ("Loss", {"training": LOSS, "validation": "val_loss"}, "sum of its parts" if parts else "nats", False),
        ("Parts of the loss", {short(name.removeprefix(PART)): name for name in [*parts][:4]}, "training", False),
        ("Scores", {short(name): name for name in facts.metrics[:4]}, "validation", False),
        ("Learning rate", {"learning rate": "lr"}, "lr", True),
    )
    for title, columns, y_label, from_zero in charts:
        points = {
            name: [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            for name, key in columns.items()
        }
        lines = [Line(name, there) for name, there in points.items() if there]
        if chart := line_chart(lines, "epoch", y_label, from_zero=from_zero):
            found.append((title, Markup(chart), [line.name for line in lines]))
    return found


def _calibration(facts: Facts) -> list[str]:
    answers, count = facts.answers, int(facts.answers.bin_count.sum())
    if not count:
        return ["No image has a prediction."]
    confidence, right = answers.bin_confidence.sum() / count, answers.bin_right.sum() / count
    lines = [
        f"Expected calibration error (ECE): {100 * answers.ece:.2f} %.",
        f"Mean confidence {100 * confidence:.2f} %, accuracy {100 * right:.2f} %: "
        f"the network is {'over' if confidence > right else 'under'}confident on the whole.",
    ]
    if one := facts.calibration:
        lines.append(
            f"Temperature {one.temperature:.3f}, fitted on {one.fitted_images:,} images. On {one.measured_images:,} others the "
            f"ECE is {100 * one.ece_after:.2f} % with it and {100 * one.ece_before:.2f} % without."
        )
    else:
        lines.append("No temperature is fitted for these weights: fasttricks evaluate RUN --calibrate fits one.")
    return lines


def _class_rows(facts: Facts, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class with images, the worst first."""
    answers, seen, right = facts.answers, facts.answers.seen.tolist(), facts.answers.right.tolist()
    wrong = answers.confusion.copy()
    wrong[range(len(names)), range(len(names))] = 0
    taken = wrong.argmax(1)
    there = sorted((k for k in range(len(names)) if seen[k]), key=lambda k: right[k] / seen[k])
    return [
        {
            "name": names[k],
            "accuracy": f"{100 * right[k] / seen[k]:.2f}",
            "images": f"{seen[k]:,}",
            "train": f"{facts.train_counts[k]:,}" if facts.train_counts is not None else "",
            "taken": names[taken[k]] if wrong[k, taken[k]] else "",
            "times": f"{int(wrong[k, taken[k]]):,}",
        }
        for k in there
    ]


def _matrix(answers: Answered) -> list[list[tuple[str, str]]]:
    """Rows of (images, share of the row as the strength of a colour)."""
    rows = []
    for row in answers.confusion.tolist():
        total = sum(row) or 1
        rows.append([(f"{value:,}" if value else "", f"{0.75 * math.sqrt(value / total):.2f}") for value in row])
    return rows


def _pairs(answers: Answered, names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    seen = answers.seen.tolist()
    return [(names[t], names[p], f"{n:,}", f"{seen[t]:,}") for t, p, n in answers.confusions[:PAIRS]]


def _mistake(facts: Facts, names: Sequence[str], number: int) -> dict[str, str]:
    mistakes = facts.answers.mistakes
    image = int(mistakes.images[number])
    picture, why = "", ""
    try:
        found = decode(facts.images.read(image), facts.max_pixels)
        found.thumbnail((_SIDE, _SIDE))
        picture = data_uri(found.convert("RGB"), "JPEG", quality=_QUALITY)
    except OSError as error:
        why = why_unreadable(error)
    except BadImage as error:
        why = str(error)
    return {
        "file": short(facts.images.name(image)),
        "true": names[int(mistakes.true[number])],
        "predicted": names[int(mistakes.predicted[number])],
        "confidence": f"{100 * float(mistakes.confidence[number]):.1f}",
        "picture": picture,
        "why": short(why),
    }


def _changed(facts: RunFacts) -> list[tuple[str, str, str]]:
    if facts.recipe is None:
        return []
    ours, theirs = flatten(facts.config), flatten(facts.recipe)
    skip = ("run_dir", "resume")
    names = [name for name in ours if name not in skip and ours[name] != theirs.get(name)]
    return [(name, _value(ours[name]), _value(theirs.get(name))) for name in names]


def _value(value: Any) -> str:
    return short("-" if value is None or value == "" else value)


def write_page(file: Path, page: str) -> int:
    """Write the page, whole. Returns its bytes. Raises OSError."""
    from fasttricks.system.files import write_whole

    content = page.encode("utf-8", "backslashreplace")
    write_whole(file, content)
    return len(content)
