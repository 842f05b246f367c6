"""The progress bar at every width: what it says is whole, and the bar takes the room that is left."""

from __future__ import annotations

import pytest
from rich.console import Console

from fasttricks.system.progress import progress_bar, time_left

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
