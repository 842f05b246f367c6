"""The files that name the classes of masks: classes.txt, and ADE20K's objectInfo150.txt. No torch, no DALI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasttricks.config import show_name
from fasttricks.data.masks.source import MOST_CLASSES
from fasttricks.data.sources.errors import DataError
from fasttricks.system.reading import Reader, is_there

CLASSES, OBJECTS = "classes.txt", "objectInfo150.txt"
_LINES = Reader(DataError, "must hold the name of a class in each line, value 0 of a mask first", "mend it")
_TABLE = Reader(
    DataError,
    "must hold a table with tabs, with the columns Idx (1, 2, 3, ...) and Name",
    "take ADE20K's file, or mend it",
)


def read_classes(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The names in ROOT/classes.txt, by class; or in ROOT/FOLDER/classes.txt of `folders`, which must agree with it.

    Raises DataError where no file is there, one cannot be read, names a class twice or none, or has other names than another.
    """
    known: dict[Path, tuple[str, ...]] = {}
    for path in (root / CLASSES, *(root / folder / CLASSES for folder in folders)):
        if is_there(path):
            known[path] = _named(_LINES, path, _lines(path))
    if not known:
        raise DataError(f"{root / CLASSES}: no such file; it {_LINES.rule}")
    (first, names), *others = known.items()
    for path, other in others:
        if difference := first_difference(names, other):
            raise DataError(
                f"{path}: must name the classes of {first} in the same order ({difference}); mend one of them"
            )
    return names


def read_objects(root: Path) -> tuple[str, ...]:
    """The column Name of ROOT/objectInfo150.txt, in the order of Idx. Raises DataError."""
    path = root / OBJECTS
    if not is_there(path):
        raise DataError(f"{path}: no such file; it {_TABLE.rule}")
    header, *rows = [line.split("\t") for line in _lines(path, _TABLE)] or [[]]
    columns = [column.strip() for column in header]
    missing = [column for column in ("Idx", "Name") if column not in columns]
    if missing:
        raise _TABLE.refusal(path, f"no column {' and '.join(missing)}")
    number_at, name_at = columns.index("Idx"), columns.index("Name")
    names = []
    for row, cells in enumerate(rows, 1):
        if len(cells) != len(columns):
            raise _TABLE.refusal(path, f"line {row + 1} has {len(cells)} columns, the header {len(columns)}")
        if cells[number_at].strip() != str(row):
            raise _TABLE.refusal(path, f"line {row + 1} has Idx {cells[number_at]!r}, not {row}")
        names.append(cells[name_at].strip())
    return _named(_TABLE, path, names)


def first_difference(names: Sequence[str], others: Sequence[str]) -> str:
    """The first class that differs, in words; empty where they are the same."""
    for at, (name, other) in enumerate(zip(names, others, strict=False)):
        if name != other:
            return f"class {at} is {show_name(other)} there and {show_name(name)} here"
    return f"{len(others)} classes there and {len(names)} here" if len(names) != len(others) else ""


def _lines(path: Path, reader: Reader = _LINES) -> list[str]:
    """The lines of the file without empty ones at its end."""
    try:
        text = reader.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise reader.refusal(path, f"not UTF-8 at byte {error.start}") from error
    return text.rstrip().replace("\r\n", "\n").split("\n") if text.strip() else []


def _named(reader: Reader, path: Path, names: Sequence[str]) -> tuple[str, ...]:
    """`names` without spaces around them, each checked."""
    found: dict[str, int] = {}
    for at, name in enumerate(name.strip() for name in names):
        if not name:
            raise reader.refusal(path, f"class {at} has no name")
        if name in found:
            raise reader.refusal(path, f"{show_name(name)} is class {found[name]} and class {at}")
        found[name] = at
    if not found:
        raise reader.refusal(path, "it names none")
    if len(found) > MOST_CLASSES:
        raise DataError(
            f"{path}: names {len(found)} classes; at most {MOST_CLASSES} are taken, as 255 is ignored; leave some out"
        )
    return tuple(found)
