"""Errors that a user can correct: each with value, rule and way out, and the nearest right name beside a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def show_name(name: object) -> str:
    """A name of a file, folder or class as one line for any terminal, log and page: unprintable characters are escaped.

    Names are data: they may hold line breaks, terminal escapes and bytes that are no UTF-8.
    """
    text = str(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_classes(count: int) -> str:
    """`1 class`, `1,000 classes`: a detector may have a single one."""
    return f"{count:,} class{'es' * (count != 1)}"


class UserError(ValueError):
    """Something the user can set right. The message names value, rule and way out; entry points print it and exit 2."""

    def __str__(self) -> str:
        """The message in one line, whatever the names in it hold; listed items have further lines, each indented by two."""
        return "\n  ".join(map(show_name, super().__str__().split("\n  ")))


class ConfigError(UserError):
    """A config value that breaks a rule."""


class DoesNotApplyError(ConfigError):
    """A setting that the network has no use for, as zero gamma without residual blocks."""


def require(ok: bool, field_name: str, value: object, rule: str, error: type[ConfigError] = ConfigError) -> None:
    """Raise `error` unless `ok`, as `field = value: rule`."""
    if not ok:
        raise error(f"{field_name} = {value!r}: {rule}")


def nearest(name: str, known: Iterable[str], likeness: float = 0.0) -> str:
    """The name of `known` that is most like `name`; empty where none is as like as `likeness`, 0 to 1 (the same)."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)), "")


def unknown(name: str, known: Iterable[str]) -> str:
    """The rule that an unknown name breaks: 'unknown; did you mean X?', or 'unknown' where nothing is like it."""
    near = nearest(name, known, likeness=0.4)
    return f"unknown; did you mean {near!r}?" if near else "unknown"
