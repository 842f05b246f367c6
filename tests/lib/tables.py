"""Tables of tests whose whole product takes long: a part that covers it in make test, all of it in make test-all."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def covering(*columns: Sequence[Any], together: int = 1) -> list[Any]:
    """The rows of the product of `columns`, for parametrize; all but a few are slow.

    The few have each choice of values of any `together` columns: 1 is each value once, 2 is each pair of values. They are
    the same in every process, and no row has to be written down.
    """
    rows = list(itertools.product(*(range(len(column)) for column in columns)))
    left = {part for row in rows for part in _parts(row, together)}
    quick: list[tuple[int, ...]] = []
    while left:
        used = Counter(
            part for row in quick for part in _parts(row, 1)
        )  # of two rows that say as much, the one of new values
        best = max(
            rows, key=lambda row: (len(left.intersection(_parts(row, together))), -sum(used[p] for p in _parts(row, 1)))
        )
        left.difference_update(_parts(best, together))
        quick.append(best)
    named = {row: [column[place] for column, place in zip(columns, row, strict=True)] for row in rows}
    return [pytest.param(*values, marks=() if row in quick else pytest.mark.slow) for row, values in named.items()]


def _parts(row: tuple[int, ...], together: int) -> list[tuple[tuple[int, int], ...]]:
    return list(itertools.combinations(enumerate(row), together))


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """`values`, for parametrize of one argument or of several; all but those named in `quick` are slow."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    few = [value if isinstance(value, tuple) else (value,) for value in quick]
    assert all(row in rows for row in few), few
    return [pytest.param(*row, marks=() if row in few else pytest.mark.slow) for row in rows]
