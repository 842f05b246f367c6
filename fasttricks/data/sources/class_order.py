"""The order of the classes, which numbers them: by code point as torchvision has it, natural as timm, or of a file. No torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fasttricks.config import nearest, show_name
from fasttricks.data.sources.errors import DataError
from fasttricks.system.reading import Reader, parse_json
from fasttricks.system.schema import fields, listed, text

CODEPOINT, NATURAL = "codepoint", "natural"
_RULE = "must hold the name of a class in each line, or be the config.json of an export"
_FILES = Reader(DataError, _RULE, "mend it, or take codepoint or natural", max_bytes=1 << 24)
_EXPORTED = fields({"label_names": listed(text())})


def order_classes(names: Sequence[str], order: str, *, numbered: bool = False) -> tuple[str, ...]:
    """`names`, each once, in that order: codepoint, natural, or a file that names these very classes.

    numbered: the data numbers them in the order of `names`, which codepoint leaves as it is.
    Raises DataError for an unknown order, a file that cannot be read, and for one that names others.
    """
    if order == CODEPOINT:
        return tuple(names) if numbered else tuple(sorted(names))
    if order == NATURAL:
        return tuple(sorted(names, key=natural_key))
    found = read_order(order)
    missing = [name for name in sorted(names) if name not in set(found)]
    others = [name for name in found if name not in set(names)]
    if missing or others:
        wrong = f"it lacks {show_name(missing[0])}" if missing else f"the data has no class {show_name(others[0])}"
        rule = f"must name the {len(names)} classes of the data, each once ({wrong})"
        raise DataError(f"data.class_order = {order!r}: {rule}; mend the file")
    return tuple(found)


def natural_key(name: str) -> tuple[list[int | str], str]:
    """timm's order: numbers by value, letters by code point without case; equal names by code point, where timm has no order."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], name


def describe_order(classes: Sequence[str], order: str) -> str:
    """The order in words, with two classes that show it; empty where every order but that of a file is the same."""
    if order not in (CODEPOINT, NATURAL):
        return f"in the order of {order}"
    if order == CODEPOINT and list(classes) != sorted(classes):
        return "in the order of their numbers in the data"
    by_code, natural = (order_classes(classes, one) for one in (CODEPOINT, NATURAL))
    at = next((at for at, pair in enumerate(zip(by_code, natural, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return ""
    if order == CODEPOINT:
        shown = f"{by_code[at]} before {natural[at]}, as torchvision; --data.class-order natural is timm's order"
        return f"in code point order, {shown}"
    return f"in natural order, {natural[at]} before {by_code[at]}, as timm"


def read_order(order: str) -> list[str]:
    """The classes that the file `order` names, each once. Raises DataError where it cannot be read or is none."""
    path = Path(order)
    if not os.path.lexists(path):
        near = nearest(order, (CODEPOINT, NATURAL), likeness=0.4)
        hint = f"; did you mean {near!r}?" if near else ""
        raise DataError(
            f"data.class_order = {order!r}: must be codepoint, natural or a file, and no file is there{hint}"
        )
    content = _FILES.read(path)
    if path.suffix == ".json":
        try:
            found: list[str] = parse_json(content, _EXPORTED)["label_names"]
        except ValueError as error:
            raise _FILES.refusal(path, error) from error
    else:
        found = [os.fsdecode(line) for line in content.splitlines() if line.strip()]
    name, count = next(iter(Counter(found).most_common(1)), ("", 0))
    if count > 1:
        raise _FILES.refusal(path, f"{show_name(name)} stands {count} times in it")
    return found
