"""The rule of a field's value, written once beside its type: checked when a config is made, and shown in its help.

flip: Annotated[float, Range(0, 1)] = 0.5
color: Literal["paper", "published", "none"] = "paper"
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from fasttricks.config.errors import require


class Rule(ABC):
    """The rule of a value."""

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Whether `value`, which is of its field's type, is so."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The words after 'must be'."""

    @property
    def message(self) -> str:
        """The rule as the error says it."""
        return f"must be {self.words}"


@dataclass(frozen=True)
class Range(Rule):
    """A finite number from `low` to `high`, both allowed."""

    low: float
    high: float = math.inf
    above: bool = False
    """`low` itself is not allowed."""
    below: bool = False
    """`high` itself is not allowed."""
    zero: str = ""
    """The meaning of 0, which is then allowed, also outside of the range."""
    unit: str = ""
    note: str = ""
    """An addition to the error."""

    def holds(self, value: float) -> bool:
        """False for NaN and infinity too."""
        if self.zero and value == 0:
            return True
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below or self.high == math.inf else value <= self.high)

    @property
    def words(self) -> str:
        """8 or more pixels; 0 to 1; above 0 and below 1; 0 (off) or more; 1 to 100, or 0 (choose)."""
        zero = f"0 ({self.zero})" if self.zero else ""
        inside = bool(zero) and self.low == 0 and not self.above
        low, high = zero if inside else _shown(self.low), _shown(self.high)
        if self.high < math.inf and not self.above and not self.below:
            words = f"{low} to {high}"
        else:
            end = "" if self.high == math.inf else f" and {'below' if self.below else 'at most'} {high}"
            words = f"above {low}{end}" if self.above else f"{low} or more{end}"
        unit = f" {self.unit}" if self.unit else ""
        return f"{words}{unit}{'' if inside or not zero else f', or {zero}'}"

    @property
    def message(self) -> str:
        """With the note."""
        return super().message + (f"; {self.note}" if self.note else "")


def _shown(number: float) -> str:
    """In full where it is whole: 65536, not 6.6e+04; a large power of two as 2^63."""
    if not isinstance(number, int):
        return f"{number:g}"
    return f"2^{number.bit_length() - 1}" if number > 1 << 40 and number.bit_count() == 1 else str(number)


@dataclass(frozen=True)
class Span(Rule):
    """Two finite numbers, the ends of a range: above `low`, in order, at most `high`."""

    low: float
    high: float = math.inf

    def holds(self, value: tuple[float, ...]) -> bool:
        """False where there are not two."""
        return len(value) == 2 and all(map(math.isfinite, value)) and self.low < value[0] <= value[1] <= self.high

    @property
    def words(self) -> str:
        """Two numbers with 0 < first <= second <= 1."""
        return f"two numbers with {self.low:g} < first <= second <= {self.high:g}"


@dataclass(frozen=True)
class Rising(Rule):
    """Any count of numbers, each above the one before, the first above 0."""

    empty: bool = True
    """Whether there may be none."""

    def holds(self, value: tuple[float, ...]) -> bool:
        """Whether they are so, and finite."""
        return (self.empty or bool(value)) and all(a < b < math.inf for a, b in zip((0.0, *value), value, strict=False))

    @property
    def words(self) -> str:
        """Rising and above 0; one number or more, rising and above 0."""
        return "rising and above 0" if self.empty else "one number or more, rising and above 0"


@dataclass(frozen=True)
class Channels(Rule):
    """Three finite numbers, of R, G and B, each from `low` to `high`."""

    low: float
    high: float

    def holds(self, value: tuple[float, ...]) -> bool:
        """False where there are not three, and for NaN."""
        return len(value) == 3 and all(self.low <= number <= self.high for number in value)

    @property
    def words(self) -> str:
        """Three numbers, of R, G and B, each 1 to 255; and the way from the other usual scale."""
        scale = "on the scale of 0 to 255; multiply those of the scale of 0 to 1 by 255"
        return f"three numbers, of R, G and B, each {self.low:g} to {self.high:g}, {scale}"


@dataclass(frozen=True)
class OneOf(Rule):
    """One of the values of a Literal: the type checker sees them, a caller's JSON does not."""

    choices: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """By equality."""
        return value in self.choices

    @property
    def words(self) -> str:
        """One of a, b, c."""
        return f"one of {', '.join(map(str, self.choices))}"


@cache
def field_rules(cls: type) -> Mapping[str, Rule]:
    """Field -> its rule, of the dataclass `cls`; fields that may be anything of their type are left out."""
    found: dict[str, Rule] = {}
    for name, kind in get_type_hints(cls, include_extras=True).items():
        if get_origin(kind) is Annotated:
            found.update((name, rule) for rule in get_args(kind) if isinstance(rule, Rule))
        elif get_origin(kind) is Literal:
            found[name] = OneOf(get_args(kind))
    return found


def check_fields(config: Any, section: str = "") -> None:
    """Raise ConfigError for the first field of `config` whose value breaks its rule. section: the prefix of its name."""
    for name, rule in field_rules(config.__class__).items():
        value = getattr(config, name)
        require(rule.holds(value), section + name, value, rule.message)
