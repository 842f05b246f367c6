"""Images and their classes from data.labels, a CSV or TSV with a header: columns path, label and, where it has one, split.

The table and its paths are relative to data.root. The images are those of a folder of files: a missing one is bad, and another
takes its place. The order of the rows does not matter. No torch, no DALI.
"""

from __future__ import annotations

import csv
import os
import posixpath
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fasttricks.config import DataConfig, show_name, unknown
from fasttricks.data.sources.checked import find_bad
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import ImageFolder, show_names
from fasttricks.data.sources.quarantine import QUARANTINE, read_quarantine
from fasttricks.data.sources.splits import SPLIT_OF, choose_val
from fasttricks.data.sources.walk import why_none
from fasttricks.system.reading import Reader, is_there

COLUMNS = ("path", "label", "split")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_MEND = "mend the table"
_BETWEEN = "\0"  # no table has it
_TABLES = Reader(DataError, "must be a table in lines of at most 1 MiB", _MEND)


class Rows(NamedTuple):
    """The rows of a split, sorted by label and then by path."""

    paths: tuple[str, ...]
    """Relative to data.root."""
    labels: tuple[str, ...]
    """The cells; of several labels, their classes in order, joined by _BETWEEN."""
    lines: array[int]
    """Where each row ends in the table, from 1 on."""


def names_table(config: DataConfig, split: str) -> bool:
    """Whether data.labels is given."""
    return bool(config.labels)


def table_holds(config: DataConfig, split: str) -> bool:
    """Whether the table has rows of that split; all are train where it has no column split. Raises DataError as read_table."""
    return split in _table(config)


def open_table(config: DataConfig, split: str, classes: tuple[str, ...] | None) -> ImageFolder:
    """The images of the rows of that split, named by their paths below data.root, or below data.root/SPLIT where all lie there.

    So a table that describes class folders is the same data set. Raises DataError as read_table, and for a class that
    `classes` lacks, and one without an image that can be used.
    Cost: as scan_folder; the table is read once.
    """
    rows, place, below = _table(config)[split], _place(config), f"{split}/"
    if all(path.startswith(below) for path in rows.paths):
        rows = rows._replace(paths=tuple(path[len(below) :] for path in rows.paths))
    else:
        below = ""
    return images_of(rows, Path(config.root), below, place, split, classes, label_separator=config.label_separator)


def images_of(
    rows: Rows,
    root: Path,
    below: str,
    place: Path,
    split: str,
    classes: tuple[str, ...] | None,
    *,
    label_separator: str = "",
    mend: str = "mend the paths, which are relative to data.root",
) -> ImageFolder:
    """The images of `rows`, whose paths are relative to the folder `below` of `root`, "" or one that ends in /.

    place: the file that has the rows, for messages; mend: their way out.

    Raises DataError for a class that `classes` lacks, and one without an image that can be used.
    """
    cells = {cell: _named(cell) for cell in rows.labels}
    known = classes or tuple(sorted({name for names in cells.values() for name in names}))
    number = {name: label for label, name in enumerate(known)}
    strange = {cell: name for cell, names in cells.items() for name in names if name not in number}
    stranger = next((at for at, cell in enumerate(rows.labels) if cell in strange), None)
    if stranger is not None:
        label = strange[rows.labels[stranger]]
        wrong = f"label = {label!r} has no counterpart in train, which has {len(known)} classes"
        raise _refusal(place, rows.lines[stranger], wrong)
    root, files = root / below, rows.paths
    reasons = find_bad(root, files, len(files)) | read_quarantine(root, _lists_below(root, files))
    bad = {at: reasons[file] for at, file in enumerate(files) if file in reasons}
    _require_images(place, rows, cells, bad, below=below, mend=mend)
    if not label_separator:
        return ImageFolder(root, known, files, tuple(number[label] for label in rows.labels), bad=bad)
    if not any(cells.values()):
        raise DataError(f"{place}: no image of {split} has a label; {_MEND}")
    at = {cell: label for label, cell in enumerate(cells)}
    sets = tuple(tuple(sorted(number[name] for name in names)) for names in cells.values())
    return ImageFolder(root, known, files, tuple(at[cell] for cell in rows.labels), bad=bad, sets=sets)


def _require_images(
    place: Path, rows: Rows, cells: Mapping[str, Sequence[str]], bad: Mapping[int, str], *, below: str, mend: str
) -> None:
    """Raise DataError for a class all of whose images are bad."""
    good = {cell for at, cell in enumerate(rows.labels) if at not in bad} if bad else set()
    usable = {name for cell in good for name in cells[cell]}
    for at, why in bad.items():
        for name in cells[rows.labels[at]]:
            if name not in usable:
                wrong = f"no image of class {name!r} can be used ({below}{rows.paths[at]}: {why})"
                raise DataError(f"{place}: line {rows.lines[at]}: {wrong}; {mend}")


def _lists_below(root: Path, files: Sequence[str]) -> list[str]:
    """The folders below `root`, on the way to `files`, that have a quarantine list."""
    folders = {os.path.dirname(file) for file in files}
    for folder in list(folders):
        while folder := os.path.dirname(folder):
            folders.add(folder)
    return sorted(folder for folder in folders - {""} if is_there(root / folder / QUARANTINE))


def _place(config: DataConfig) -> Path:
    return Path(config.root, config.labels)


def _table(config: DataConfig) -> dict[str, Rows]:
    """That of data.labels, read once while it does not change."""
    if what := why_none(Path(config.root)):
        raise DataError(f"{config.root}: {what}; give the folder that the paths of data.labels begin at as --data.root")
    path = _place(config)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        rule = "no such file; --data.labels is relative to data.root, or absolute"
        here = f" (it is in the working directory: give {Path(config.labels).absolute()})"
        raise DataError(f"{path}: {rule}{here if Path(config.labels).is_file() else ''}") from error
    return _read_once(path, config.label_separator, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _read_once(path: Path, label_separator: str, size: int, modified_ns: int) -> dict[str, Rows]:
    return read_table(path, label_separator)


def read_table(path: Path, label_separator: str = "") -> dict[str, Rows]:
    """Split -> its rows. Without a column split all rows are train.

    label_separator: as data.label_separator; each cell of labels then has its classes in their order.

    Raises DataError with the line for: another ending than .csv or .tsv, bytes that are no UTF-8, NUL, quotes that do not
    close, a header without path and label or with a column twice, a row of another number of cells, an empty cell (but of several
    labels), a class twice in a cell, a path that is absolute or has .. in it, a path twice, an unknown split, no rows.
    """
    separator = _SEPARATORS.get(path.suffix.lower())
    if separator is None:
        raise DataError(f"data.labels = {str(path)!r}: the name must end in .csv (commas) or .tsv (tabs); rename it")
    rows = csv.reader(_lines(path), delimiter=separator, strict=True)
    found: dict[str, list[tuple[str, str, int]]] = {}
    lines: dict[str, int] = {}
    try:
        header = next((row for row in rows if row), [])
        at = _columns(path, header)
        splits: dict[str, str] = {}
        labels: dict[str, str] = {}
        for row in rows:
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells, where the header has {len(header)}")
            file = plain_path(row[at["path"]])
            if (first := lines.setdefault(file, rows.line_num)) != rows.line_num:
                raise ValueError(f"path = {file!r:.200}: line {first} names it too, and an image has one row")
            word, cell = row[at["split"]] if "split" in at else "train", row[at["label"]]
            if (split := splits.get(word)) is None:
                split = splits[word] = _split(word)
            if (label := labels.get(cell)) is None:
                label = labels[cell] = _labels(cell, label_separator)  # one string for all of its rows
            found.setdefault(split, []).append((label, file, rows.line_num))
    except DataError:
        raise  # names its line
    except (ValueError, csv.Error) as error:
        raise _refusal(path, max(1, rows.line_num), error) from error
    if not found:
        raise DataError(f"{path}: no rows below the header; {_MEND}")
    others = [name for name in header if name.strip().lower() not in COLUMNS]
    if others:
        read = ", ".join(name for name in COLUMNS if name in at)
        warnings.warn(f"{show_name(path)}: reads the columns {read}, and not {show_names(others)}", stacklevel=2)
    return choose_val(path, {split: sorted_rows(part) for split, part in found.items()})


def sorted_rows(part: list[tuple[str, str, int]]) -> Rows:
    """The rows of (label, path, line). Changes `part`."""
    part.sort()
    labels, paths, lines = zip(*part, strict=True)
    return Rows(paths, labels, array("q", lines))


def _refusal(path: Path, line: int, wrong: object) -> DataError:
    return DataError(f"{path}: line {line}: {wrong}; {_MEND}")


def _lines(path: Path) -> Iterator[str]:
    """The lines of the table as text. Raises DataError for bytes that are none."""
    for number, line in enumerate(_TABLES.each_line(path), 1):
        if b"\0" in line:
            raise _refusal(path, number, "a NUL byte")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wrong = f"not UTF-8 ({error.reason} at byte {error.start} of the line)"
            raise _refusal(path, number, wrong) from error


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    """Column -> its number."""
    names = [name.strip().lower() for name in header]
    for name in COLUMNS[:2]:
        if name not in names:
            there = show_names(header) or "none"
            kind = "commas" if path.suffix.lower() == ".csv" else "tabs"
            raise ValueError(f"the header must have the columns path and label, separated by {kind}, but has {there}")
    twice = next((name for name in COLUMNS if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"the header has the column {twice} twice")
    return {name: names.index(name) for name in COLUMNS if name in names}


def plain_path(path: str) -> str:
    """The path as it is compared: without //, ./ and the like. Raises ValueError for one that leads out of its folder."""
    if not path:
        raise ValueError("path = '': must name a file below data.root")
    if path[0] == "/":
        raise ValueError(f"path = {path!r:.200}: must be relative to data.root, not absolute")
    if ".." in path and ".." in path.split("/"):
        raise ValueError(f"path = {path!r:.200}: must stay below data.root, without ..")
    plain = path[0] != "." and "//" not in path and "/." not in path and path[-1] != "/"
    return path if plain else posixpath.normpath(path)


def _label(cell: str) -> str:
    """The class of a row."""
    if not cell or cell != cell.strip():
        raise ValueError(f"label = {cell!r:.200}: must be the name of a class, without space around it")
    return cell


def _named(cell: str) -> Sequence[str]:
    """The classes in a cell as _labels() gives it."""
    return cell.split(_BETWEEN) if cell else ()


def _labels(cell: str, separator: str) -> str:
    """The class of a row; with a separator its classes in order, joined by _BETWEEN."""
    if not separator:
        return _label(cell)
    names = list(map(_label, cell.split(separator))) if cell else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"label = {cell!r:.200}: has the class {twice!r} twice")
    return _BETWEEN.join(sorted(names))


def _split(word: str) -> str:
    split = SPLIT_OF.get(word.strip().lower())
    if split is None:
        raise ValueError(f"split = {word!r:.200}: {unknown(word, SPLIT_OF)}; train, val and test are known")
    return split
