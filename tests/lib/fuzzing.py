"""What the fuzz targets share."""

from __future__ import annotations

import time
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, settings


def take_turns(targets: tuple[Callable[[], object], ...], seconds: float) -> int:
    """Run the targets by turns for so long, once at least; returns the number of turns. Findings are raised."""
    end, turns = time.monotonic() + seconds, 0
    while time.monotonic() < end or not turns:
        for target in targets:
            target()
        turns += 1
    return turns


def settings_for(max_examples: int) -> settings:
    """Of a target that is called by turns: so many inputs a call, nothing kept between calls."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
