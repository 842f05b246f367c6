"""The one progress bar of all commands."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, **options: Any) -> Progress:
    """A bar with what is done, of how much, and the time that is left. options: of rich's Progress."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, **options)


@contextmanager
def counted(
    text: str, total: int, console: Console | None = None, *, after: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """A bar while the context lasts; yields the function that counts on. One process of a launch shows it, rank 0.

    console: None: standard error; nothing is shown where that is no terminal. after: seconds that pass before it is shown.
    """
    console = console or Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    started, done = time.monotonic(), 0
    with ExitStack() as shown:
        bar: Progress | None = None

        def advance(count: int) -> None:
            nonlocal bar, done
            done += count
            if bar is None and console.is_terminal and time.monotonic() - started >= after:
                bar = progress_bar(console, speed_estimate_period=60, transient=True)
                bar.add_task(text, total=total)
                shown.enter_context(bar)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)

        advance(0)
        yield advance
