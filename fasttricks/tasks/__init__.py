"""The tasks: data, loss and metrics of a run. Only this package knows the contents of a batch."""

from __future__ import annotations

from fasttricks.config import ConfigError
from fasttricks.learning.learner import Task
from fasttricks.tasks.classification import CLASSIFICATION
from fasttricks.tasks.detection import DETECTION
from fasttricks.tasks.multilabel import MULTILABEL
from fasttricks.tasks.segmentation import SEGMENTATION

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, MULTILABEL, SEGMENTATION, DETECTION)}
"""By the name that a checkpoint records."""


def find_task(name: str) -> Task:
    """The task called `name`. Raises ConfigError for one that this release does not know."""
    if name in TASKS:
        return TASKS[name]
    raise ConfigError(f"task = {name!r}: this release knows {', '.join(TASKS)}; take the one that wrote the checkpoint")
