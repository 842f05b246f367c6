"""The one progress bar of all commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fasttricks.config import read_launch

_NARROWEST, _WIDEST = 10, 40
"""Columns of a bar."""
LINE_S = 60.0
"""Seconds between two lines in the place of a bar."""


class _Bars(Progress):
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


def progress_bar(console: Console, **options: Any) -> Progress:
    """A bar with the work done, its total and the time left. options: those of rich's Progress."""
    return _Bars(console=console, **options)


def time_left(task: Task) -> str:
    """The time that is left as the bar shows it, h:mm:ss."""
    return TimeRemainingColumn().render(task).plain


@contextmanager
def counted(
    text: str, total: int, console: Console | None = None, *, after: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """A bar while the context lasts; yields the function that counts on. One process of a launch shows it, rank 0.

    console: None: standard error. Where that is no terminal, a line a minute stands for the bar. after: seconds that pass before
    the bar is shown.
    """
    console = console or Console(stderr=True, quiet=read_launch().rank > 0)
    started, done = time.monotonic(), 0
    told = started
    with ExitStack() as shown:
        bar: Progress | None = None

        def advance(count: int) -> None:
            nonlocal bar, done, told
            done += count
            now = time.monotonic()
            if not console.is_interactive:
                if now - told >= LINE_S:
                    left = timedelta(seconds=round((now - started) * (total - done) / done)) if done else "unknown"
                    console.print(
                        f"{text}  {done:,} of {total:,}  ETA {left}", markup=False, highlight=False, soft_wrap=True
                    )
                    told = now
            elif bar is None and now - started >= after:
                bar = progress_bar(console, speed_estimate_period=60, transient=True)
                bar.add_task(text, total=total)
                shown.enter_context(bar)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)

        advance(0)
        yield advance
