"""The commands' part of each task, a row of COMMANDS each: all that evaluate, predict, export and report know of it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fasttricks.commands.answers_shown import answers_table, answers_text
from fasttricks.commands.boxes_shown import boxes_table, boxes_text
from fasttricks.commands.drawn import Drawn, draw
from fasttricks.commands.drawn_boxes import DrawnBoxes, draw_boxes
from fasttricks.commands.export_boxes import write_boxes_onnx
from fasttricks.commands.labels_shown import labels_table, labels_text
from fasttricks.commands.network_config import DRAW_SCORE
from fasttricks.commands.pages import Reported, box_page, class_page, pixel_page
from fasttricks.commands.pixels_shown import pixels_table, pixels_text
from fasttricks.config import require
from fasttricks.data.boxes.places import require_boxes
from fasttricks.data.masks.places import require_masks
from fasttricks.data.sources import require_place

if TYPE_CHECKING:
    from fasttricks.data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How the answers of a task (Task.answer) are shown."""

    text: Callable[[Any, Sequence[str]], str]
    """(answers, classes) as lines of a terminal."""
    table: Callable[[Any, Sequence[str], Source], dict[str, Any]]
    """(answers, classes, images) as plain values, for JSON."""


@dataclass(frozen=True, kw_only=True)
class TaskCommands:
    """The commands' part of a task; the defaults are those of a task without a row, which has metrics alone."""

    require_place: Callable[..., None] = require_place
    """Raises DataError where a look at (the DataConfig, *splits) tells that they cannot be opened."""
    splits: tuple[str, ...] = ("val",)
    """The splits that evaluate takes."""
    shown: Shown | None = None
    """None: evaluate shows the metrics alone, and has no --output."""
    calibrated: bool = False
    """Whether a temperature has a meaning: a softmax for each image."""
    page: Callable[[Reported], str] | None = None
    """The page of report; None: it has none."""
    no_classes: str = ""
    """Why predict gives an image no classes, as the rule of an error; empty: it does."""
    boxes: bool = False
    """Whether its pictures have boxes with scores."""
    draw: Callable[..., Iterator[Drawn | DrawnBoxes]] | None = None
    """predict --draw: as drawn.draw; None: it is refused."""
    onnx: Callable[..., None] | None = None
    """export: writes model.onnx, as export_boxes.write_boxes_onnx; None: from pixels to logits."""


COMMANDS: dict[str, TaskCommands] = {
    "classification": TaskCommands(
        shown=Shown(text=answers_text, table=answers_table), calibrated=True, page=class_page
    ),
    "multilabel": TaskCommands(shown=Shown(text=labels_text, table=labels_table)),
    "segmentation": TaskCommands(
        require_place=require_masks,
        splits=("val", "test"),
        shown=Shown(text=pixels_text, table=pixels_table),
        no_classes="gives each pixel a class, and an image none; add --draw DIR, for pictures and masks",
        draw=draw,
        page=pixel_page,
    ),
    "detection": TaskCommands(
        require_place=require_boxes,
        splits=("val", "test"),
        shown=Shown(text=boxes_text, table=boxes_table),
        no_classes="gives each box a class, and an image none; add --draw DIR, for pictures and boxes",
        boxes=True,
        draw=draw_boxes,
        page=box_page,
        onnx=write_boxes_onnx,
    ),
}
"""By the name of the task."""


def commands_of(task: str) -> TaskCommands:
    """The row of `task`."""
    return COMMANDS.get(task, TaskCommands())


def tasks_with(has: Callable[[TaskCommands], Any]) -> str:
    """The tasks of whose rows `has` is true, in words."""
    return " and ".join(name for name, row in COMMANDS.items() if has(row))


def require_drawn(draw_score: float, task: str, *, draws: bool = True) -> None:
    """Raise ConfigError for a draw_score other than the default where there is no picture, or none with boxes."""
    rule = f"is for pictures of {tasks_with(lambda row: row.boxes)}, and has no effect here; leave it out"
    require(draw_score == DRAW_SCORE or (draws and commands_of(task).boxes), "draw_score", draw_score, rule)
