"""The one progress bar of all commands. rich is imported where a bar or a line is shown: networks and losses run without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fasttricks.config import read_launch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task

LINE_S = 60.0
"""Seconds between two lines in the place of a bar."""


def progress_bar(console: Console, **options: Any) -> Progress:
    """A bar with the work done, its total and the time left. options: those of rich's Progress."""
    from fasttricks.system.bars import Bars

    return Bars(console=console, **options)


def time_left(task: Task) -> str:
    """The time that is left as the bar shows it, h:mm:ss."""
    from rich.progress import TimeRemainingColumn

    return TimeRemainingColumn().render(task).plain


@contextmanager
def counted(
    text: str, total: int, console: Console | None = None, *, after: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """A bar while the context lasts; yields the function that counts on. One process of a launch shows it, rank 0.

    console: None: standard error. Where that is no terminal, a line a minute stands for the bar. after: seconds that pass before
    the bar is shown.
    """
    from rich.console import Console

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
