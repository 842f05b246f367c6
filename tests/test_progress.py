"""The progress bar at every width: what it says is whole, and the bar takes the room that is left."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from fasttricks.system import progress
from fasttricks.system.progress import counted, progress_bar, time_left

TEXT = "epoch  10.0  loss 1.234  lr 0.0125  1,234 imgs/sec"


@pytest.mark.parametrize("width", [200, 120, 100, 80, 75, 60, 40, 24])
def test_the_bar_leaves_every_number_whole(width: int) -> None:
    console = Console(width=width)
    now = [0.0]
    bar = progress_bar(console, get_time=lambda: now[0], speed_estimate_period=10_000)
    task = bar.add_task(TEXT, total=150_000)
    bar.advance(task, 0)
    now[0] = 8900.0
    bar.advance(task, 75_000)
    with console.capture() as shown:
        for line in bar.get_renderables():
            console.print(line)
    lines = shown.get().splitlines()
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    drawn = [word for word in words if set(word) <= set("\u2501\u2578\u257a")]
    assert [word for word in words if word not in drawn] == [*TEXT.split(), "75000/150000", time_left(bar.tasks[0])]
    assert time_left(bar.tasks[0]) == "2:28:20"
    assert len(lines) == 1 if width > 80 else len(lines) > 1
    assert sum(map(len, drawn)) > 0


def test_in_a_pipe_a_line_a_minute_stands_for_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images a second, of 1,500: lines after 60 and 120, each with the time that the rest takes."""
    now = [500.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said = StringIO()
    with counted("pack [/train]", 1500, Console(file=said, width=30)) as advance:
        for _ in range(150):
            now[0] += 1
            advance(10)
    assert said.getvalue().splitlines() == [
        "pack [/train]  600 of 1,500  ETA 0:01:30",
        "pack [/train]  1,200 of 1,500  ETA 0:00:30",
    ]
