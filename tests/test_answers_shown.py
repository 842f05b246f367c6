"""The lines of evaluate on a terminal: few, the worst first, whatever the number and names of the classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasttricks.commands.answers_shown import answers_table, answers_text, write_answers
from fasttricks.system.distributed import World
from fasttricks.tasks.answers import Answered, Answers

CPU = torch.device("cpu")
IMAGES: Any = SimpleNamespace(name="a/{}.jpg".format)


def answered(logits: torch.Tensor, labels: Sequence[int]) -> Answered:
    answers = Answers(logits.shape[1], CPU)
    answers.update(logits, torch.tensor(labels), np.arange(len(labels)))
    return answers.result(World.alone(CPU))


@pytest.mark.parametrize("classes", [2, 3, 5, 10, 11, 100])
def test_the_worst_classes_come_first_in_few_lines(classes: int) -> None:
    """Class k of ten images has k % 10 right; the others are taken for the next class."""
    labels = [k for k in range(classes) for _ in range(10)]
    taken = [k if i < k % 10 else (k + 1) % classes for k in range(classes) for i in range(10)]
    found = answered(5 * torch.nn.functional.one_hot(torch.tensor(taken), classes).float(), labels)
    lines = answers_text(found, [f"c{k}" for k in range(classes)]).splitlines()
    assert len(lines) <= 21
    rows = [line.split() for line in lines[1 : 1 + min(classes, 10)]]
    assert [row[0] for row in rows] == [f"c{k}" for k in sorted(range(classes), key=lambda k: k % 10)[:10]]
    assert rows[0][1:] == ["0.00", "%", "10"]
    assert ("more classes, of" in "\n".join(lines)) == (classes > 10)
    assert f"c0 taken for c{1 % classes}: 10 of 10" in lines
    assert ("more pairs of classes" in "\n".join(lines)) == (len(found.confusions) > 6)
    assert lines[-1].startswith("ECE ")


def test_names_cannot_command_a_terminal_and_absent_classes_and_nan_are_said(tmp_path: Path) -> None:
    logits = torch.tensor([[5.0, 0, 0], [float("nan"), 0, 0]])
    found = answered(logits, [1, 0])
    lines = answers_text(found, ["\x1b[31mred", "b\nc", "nobody"]).splitlines()
    assert "\x1b" not in "".join(lines) and any(r"b\nc taken for \x1b[31mred: 1 of 1" in line for line in lines)
    assert "1 of 3 classes have no image here" in lines
    assert "1 images have a NaN among their logits; they count as wrong" in lines
    table = answers_table(found, ["a", "b", "c"], IMAGES)
    write_answers(str(tmp_path / "a.json"), {"metrics": {"val_loss": float("nan")}, **table})
    whole = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert whole["nll"] is None and whole["metrics"] == {"val_loss": None} and whole["classes"][2]["accuracy"] is None
    assert [row["undecided"] for row in whole["classes"]] == [1, 0, 0]
    assert whole["mistakes"] == [
        {"image": "a/0.jpg", "true": "b", "predicted": "a", "confidence": found.mistakes.confidence[0]}
    ]


def test_nothing_decided_has_no_calibration() -> None:
    lines = answers_text(answered(torch.full((2, 2), float("nan")), [0, 1]), ["a", "b"])
    assert "ECE" not in lines and "2 images have a NaN" in lines
