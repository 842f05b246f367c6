"""Bad files of a split: how many may be, and how they are named. No torch, no DALI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Literal

from fasttricks.config import show_name
from fasttricks.data.sources.errors import DataError

_SHOWN = 20
"""Bad files that are named at a time on stderr."""


def require_few_bad(place: object, bad: int, count: int, max_bad: float, last: Callable[[], tuple[str, str]]) -> None:
    """Raise DataError where more than the share max_bad of the `count` files of `place` are bad, or all.

    last(): the name of one of the bad ones, and why it is; asked for the message alone.
    """
    if not bad or (bad <= max_bad * count and bad < count):
        return
    name, why = last()
    if bad == count:  # there would be no end to the search for a good one
        raise DataError(f"{place}: no good image is left; {why}")
    raise DataError(
        f"{place}: {bad} of {count} images are bad, over data.max_bad = {max_bad:g} of them (one is "
        f"{show_name(name)}: {why}); repair or remove them, or raise --data.max-bad"
    )


def name_bad(new: Sequence[tuple[str, str]], then: str, *, kind: Literal["image", "box"] = "image") -> None:
    """Name bad images on stderr, each a line (name, why), the first of many. then: how the loader goes around them."""
    for name, why in new[:_SHOWN]:
        print(f"bad {kind} {show_name(name)}: {show_name(why)}; {then}", file=sys.stderr, flush=True)
    if len(new) > _SHOWN:
        kinds = {"image": "images", "box": "boxes"}[kind]
        print(f"{len(new) - _SHOWN} more bad {kinds}: {then}; the run's summary.json names all", file=sys.stderr)
