"""The fields of a config, and the text that the command line shows of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import get_type_hints


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
