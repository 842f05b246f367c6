"""The fields of a config, values at the edges of what they may be, and the text that the command line shows of them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from fasttricks.config import Range, Rising, Span, field_rules
from fasttricks.config.ranges import Channels, OneOf, Rule
from fasttricks.config.recipes import RECIPES

OF_CLASSIFIERS = tuple(name for name in RECIPES if RECIPES[name]().task == "classification")
"""The recipes that the tricks and the tables of an ablation are for; tests/test_segmentation.py has the others."""

FAMILIES = {"zero_gamma": "resnet", "resnet_d": "resnet", "whitening": "cifarnet", "identity_init": "cifarnet"}
"""The networks that a trick is for, where it is not for all."""


def has_use_for(recipe: str, trick: str) -> bool:
    """Whether the trick applies to the recipe's network."""
    return RECIPES[recipe]().model.name.startswith(FAMILIES.get(trick, ""))


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted path, class that has it, field name) of every field that is not itself a section."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, cls, field.name


def plain(text: str) -> str:
    """The words of tyro's boxes on one line."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


def edges(cls: type, name: str) -> tuple[list[Any], list[Any]]:
    """(values just inside, values just outside) what the field `name` of the dataclass `cls` may be."""
    rule, whole = field_rules(cls)[name], get_type_hints(cls)[name] is int
    if isinstance(rule, Range):
        return _of_range(rule, whole)
    if isinstance(rule, Span):
        low, high, over = math.nextafter(rule.low, math.inf), min(rule.high, 1e9), math.nextafter(rule.high, math.inf)
        inside: list[Any] = [(low, low), (low, high), (high, high)]
        return inside, [(rule.low, high), (low, over), (high, low), (low,), (low, low, high), (math.nan, high)]
    if isinstance(rule, Rising):
        beyond: list[Any] = [(0,), (-1, 30), (30, 30), (60, 30), (30, math.nan), (30, math.inf)]
        return ([(), (5e-324,), (1, 2.5)], beyond) if rule.empty else ([(5e-324,), (1, 2.5)], [(), *beyond])
    if isinstance(rule, Channels):
        within, beyond = _of_range(Range(rule.low, rule.high), False)
        return [(low, within[1], within[0]) for low in within], [
            *((8.0, 9.0, x) for x in beyond),
            (9.0, 9.0),
            (9.0,) * 4,
        ]
    assert isinstance(rule, OneOf)
    return list(rule.choices), ["neither", ""]


def _of_range(rule: Range, whole: bool) -> tuple[list[Any], list[Any]]:
    def step(value: float, up: bool) -> float:
        return value + (1 if up else -1) if whole else math.nextafter(value, math.inf if up else -math.inf)

    inside = [step(rule.low, True) if rule.above else rule.low, *([0] if rule.zero else [])]
    outside = [rule.low if rule.above else step(rule.low, False), *([-1] if rule.zero else [])]
    if rule.high < math.inf:
        inside.append(step(rule.high, False) if rule.below else rule.high)
        outside.append(rule.high if rule.below else step(rule.high, True))
    outside = [value for value in outside if not (rule.zero and value == 0)]
    if whole:
        return [int(value) for value in inside], [int(value) for value in outside]
    return [float(value) for value in inside], [*map(float, outside), math.inf, -math.inf, math.nan]


def words_of(rule: Rule) -> str:
    """What the help says of a field after the string under it; empty of a Literal, whose choices tyro shows."""
    return "" if isinstance(rule, OneOf) else f"Must be {rule.words}."
