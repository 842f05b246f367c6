"""The one progress bar of all commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, **options: Any) -> Progress:
    """A bar with what is done, of how much, and the time that is left. options: of rich's Progress."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, **options)


@contextmanager
def counted(text: str, total: int, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """A bar while the context lasts; yields the function that counts on. console: None: standard error."""
    console = console or Console(stderr=True)
    with progress_bar(console, speed_estimate_period=60, transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)
