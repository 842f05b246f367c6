"""What the fuzz targets share."""

from __future__ import annotations

import time
from collections.abc import Callable


def take_turns(targets: tuple[Callable[[], object], ...], seconds: float) -> int:
    """Run the targets by turns for so long, once at least; returns the number of turns. Findings are raised."""
    end, turns = time.monotonic() + seconds, 0
    while time.monotonic() < end or not turns:
        for target in targets:
            target()
        turns += 1
    return turns
