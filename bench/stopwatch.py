"""The seconds of a piece of work by part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Seconds by part; those of a part within another count for the inner one alone."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """clock: seconds; None: those of this thread."""
        self._clock = clock or time.thread_time
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Its seconds are `name`'s within the block."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """The seconds from here are `name`'s, to its end()."""
        self._switch()
        self._parts.append(name)

    def end(self) -> None:
        """End the part that began last."""
        self._switch()
        self._parts.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, a call of which is such a block."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def _switch(self) -> None:
        now = self._clock()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now
