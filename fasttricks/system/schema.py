"""Schemas of values that came as JSON: kinds, ranges and lengths, composed of small parts. No torch.

A Kind is called with a value and where it stands, empty for the whole, and raises WrongError where the value is not of it:

    fields({"step": whole(), "epoch": number()}, others=number())(json.loads(line), "")
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Kind = Callable[[Any, str], None]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = _SHORT.maxdict = 2


class WrongError(ValueError):
    """A value that is not of its kind: its place, the value and its rule."""

    def __init__(self, where: str, value: object, rule: str) -> None:
        super().__init__(f"{where or 'it'} = {_SHORT.repr(value)}: must be {rule}")


def anything(value: Any, where: str) -> None:
    """Whatever JSON has."""


def whole(low: int = 0, high: int = 2**63 - 1) -> Kind:
    """A whole number from `low` to `high`, both allowed."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise WrongError(where, value, f"a whole number, {low} to {high}")

    return check


def number(*, finite: bool = False) -> Kind:
    """A number; NaN and infinity too, which Python writes, unless it must be finite."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float):
            raise WrongError(where, value, "a number")
        if finite and not math.isfinite(value):
            raise WrongError(where, value, "a finite number")

    return check


def text(longest: int = 1000, pattern: str = "", words: str = "") -> Kind:
    """A string of at most `longest` characters, all of which the regular expression matches; words: that rule in words."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise WrongError(where, value, f"a text of at most {longest} characters")
        if pattern and not re.fullmatch(pattern, value):
            raise WrongError(where, value, words)

    return check


def listed(item: Kind) -> Kind:
    """A list of items."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise WrongError(where, value, "a list")
        for at, one in enumerate(value):
            item(one, _inside(where, at))

    return check


def table(item: Kind, key: Kind = anything) -> Kind:
    """Names, each with an item."""
    return fields({}, others=item, key=key)


def optional(kind: Kind) -> Kind:
    """The kind, or null."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            kind(value, where)

    return check


def fields(
    needed: Mapping[str, Kind], allowed: Mapping[str, Kind] | None = None, others: Kind = anything, key: Kind = anything
) -> Kind:
    """Names with values: all of `needed`, any of `allowed`, and others, whose names are of the kind `key`."""
    known = {**(allowed or {}), **needed}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise WrongError(where, value, "a table of names and values")
        missing = next((name for name in needed if name not in value), None)
        if missing is not None:
            raise WrongError(where, value, f"a table with {missing!r} in it")
        for name, one in value.items():
            if name not in known:
                key(name, f"a name in {where or 'it'}")
            known.get(name, others)(one, _inside(where, name))

    return check


def _inside(where: str, name: object) -> str:
    return f"{where}[{_SHORT.repr(name)}]" if where else _SHORT.repr(name).strip("'")
