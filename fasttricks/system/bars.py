"""The class of the one progress bar, rich's with a text that is never cut. progress.py imports it where a bar is shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.cells import cell_len
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_NARROWEST, _WIDEST = 10, 40
"""Columns of a bar."""


class Bars(Progress):
    """A line a task; two where the terminal is too narrow for the text and a bar: the text is never cut."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield from self._lines(task)

    def _lines(self, task: Task) -> Iterator[RenderableType]:
        text = TextColumn("{task.description}", markup=False)
        counted = MofNCompleteColumn(), TimeRemainingColumn()
        taken = sum(1 + cell_len(column.render(task).plain) for column in counted)
        free = self.console.width - taken
        beside = free - cell_len(task.description) - 1
        if beside >= _NARROWEST:
            self.columns = text, BarColumn(min(_WIDEST, beside)), *counted
        else:
            yield Text(task.description, overflow="fold")
            self.columns = BarColumn(max(1, min(_WIDEST, free))), *counted
        yield self.make_tasks_table([task])
