"""The answers of evaluate: as lines of a terminal, and whole as a file of JSON. docs/evaluation.md has the format. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttricks.config import ConfigError, require, show_name
from fasttricks.system.files import temporary_of, write_whole

if TYPE_CHECKING:
    from fasttricks.data.sources import Source
    from fasttricks.tasks.answers import Answered

_CLASSES, _CONFUSIONS = 10, 6
"""Lines of each kind on a terminal, at most."""


def answers_text(answers: Answered, classes: Sequence[str]) -> str:
    """The worst classes, the most frequent confusions and the calibration, in at most 22 lines."""
    shown = [show_name(name) for name in classes]
    parts = [_class_lines(answers, shown), _confusion_lines(answers, shown), _calibration_line(answers)]
    return "\n".join(line for part in parts for line in part)


def _class_lines(answers: Answered, classes: Sequence[str]) -> list[str]:
    seen, right = answers.seen.tolist(), answers.right.tolist()
    there = sorted((k for k in range(len(classes)) if seen[k]), key=lambda k: right[k] / seen[k])
    rows = there[:_CLASSES]
    width = max(len("class"), *(len(classes[k]) for k in rows))
    lines = [f"{'class':{width}}  accuracy  images"]
    lines += [f"{classes[k]:{width}}  {100 * right[k] / seen[k]:6.2f} %  {seen[k]:6,}" for k in rows]
    if more := len(there) - len(rows):
        lowest = 100 * right[there[_CLASSES]] / seen[there[_CLASSES]]
        lines.append(f"{more:,} more classes, of {lowest:.2f} % and above; --output FILE.json has them")
    if absent := len(classes) - len(there):
        lines.append(f"{absent:,} of {len(classes):,} classes have no image here")
    return lines


def _confusion_lines(answers: Answered, classes: Sequence[str]) -> list[str]:
    found, seen = answers.confusions, answers.seen.tolist()
    lines = [f"{classes[t]} taken for {classes[p]}: {n:,} of {seen[t]:,}" for t, p, n in found[:_CONFUSIONS]]
    if undecided := int(answers.undecided.sum()):
        lines.append(f"{undecided:,} images have a NaN among their logits; they count as wrong")
    if more := max(0, len(found) - _CONFUSIONS):
        lines.append(f"{more:,} more pairs of classes are confused")
    return lines


def _calibration_line(answers: Answered) -> list[str]:
    count = int(answers.bin_count.sum())
    if not count:
        return []
    confidence, right = answers.bin_confidence.sum() / count, answers.bin_right.sum() / count
    return [f"ECE {100 * answers.ece:.2f} %: mean confidence {100 * confidence:.2f} %, accuracy {100 * right:.2f} %"]


def check_json(output: str) -> None:
    """Raise ConfigError where no new file can be written at `output`, as far as can be told; empty: none is asked for."""
    if not output:
        return
    require(output.endswith(".json"), "output", output, "must end in .json; give another name")
    rule = "already exists and is never overwritten; give another --output"
    require(not os.path.lexists(output), "output", output, rule)
    folder = Path(output).parent
    rule = "must be in a folder that is there and may be written to; give another --output"
    require(folder.is_dir() and os.access(folder, os.W_OK | os.X_OK), "output", output, rule)


def write_answers(output: str, facts: Mapping[str, Any]) -> None:
    """Write `facts` to the new file `output`, whole or not at all. Raises ConfigError."""
    check_json(output)
    text = json.dumps(_finite(dict(facts)), allow_nan=False, indent=1)
    try:
        write_whole(Path(output), (text + "\n").encode(), temporary_of(Path(output)))
    except OSError as error:
        rule = f"must be a place to write to; give another --output ({error})"
        raise ConfigError(f"output = {output!r}: {rule}") from error


def answers_table(answers: Answered, classes: Sequence[str], images: Source) -> dict[str, Any]:
    """All answers as plain values; docs/evaluation.md names them. A number that is not finite is NaN here, null in the file."""
    columns = (answers.seen.tolist(), answers.right.tolist(), answers.accuracy.tolist(), answers.undecided.tolist())
    bins = len(answers.bin_count)
    sums = (answers.bin_count.tolist(), answers.bin_right.tolist(), answers.bin_confidence.tolist())
    return {
        "ece": answers.ece,
        "nll": answers.nll,
        "classes": [
            {"name": name, "images": seen, "right": right, "accuracy": accuracy, "undecided": undecided}
            for name, seen, right, accuracy, undecided in zip(classes, *columns, strict=True)
        ],
        "confusion": answers.confusion.tolist(),
        "reliability": [
            {"above": b / bins, "to": (b + 1) / bins, "images": count, "right": right, "confidence_sum": confidence}
            for b, (count, right, confidence) in enumerate(zip(*sums, strict=True))
        ],
        "mistakes": [
            {
                "image": images.name(image),
                "true": classes[true],
                "predicted": classes[predicted],
                "confidence": confidence,
            }
            for image, true, predicted, confidence in zip(*(part.tolist() for part in answers.mistakes), strict=True)
        ],
    }


def _finite(value: Any) -> Any:
    """`value` with null for each number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value
