"""Predictions as rows of a file: .csv, .jsonl or .parquet, written as they come; docs/predictions.md has the formats. No torch.

The rows go to NAME.partial.SUFFIX, which gets its name when all are there. Where the command ends before, that file stays.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from fasttricks.config import ConfigError, UserError, read_launch, require, show_name
from fasttricks.system.extras import missing_extra

if TYPE_CHECKING:
    import numpy as np
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs a cell that begins so."""
_ROW_GROUP = 1024
"""Rows that are in memory until they are written to a .parquet: 8 MB of embeddings of 2,048 numbers."""


class Prediction(NamedTuple):
    """The network's prediction for one image."""

    path: str
    classes: list[tuple[str, float]]
    """Name and probability, 0 to 1, the likeliest first; empty where the image cannot be used."""
    error: str = ""
    """Why it cannot."""
    embedding: NDArray[np.float32] | None = None
    """(D,): the features that enter the classifier; None where they were not asked for, or the image cannot be used."""


class Rows(Protocol):
    """An open file of predictions."""

    def write(self, prediction: Prediction) -> None:
        """Append a row. Raises OSError."""

    def close(self) -> None:
        """Write all that is in memory, and close the file. Raises OSError."""


class _Lines:
    """A row a line: no row holds a line break, so a file that was cut off has whole rows up to its last line break."""

    def __init__(self, file: IO[bytes], top: int, *, embed: bool) -> None:
        self._file, self._top, self._embed, self._begun = file, top, embed, False

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class CsvRows(_Lines):
    """file, class_1, probability_1, ..., error. UTF-8, in which every cell is harmless to a terminal and a spreadsheet."""

    def write(self, prediction: Prediction) -> None:
        if not self._begun:
            self._begun = True
            ranks = range(1, self._top + 1)
            self._line(["file", *(f"{name}_{rank}" for rank in ranks for name in ("class", "probability")), "error"])
        cells = [cell for name, share in prediction.classes for cell in (csv_cell(name), repr(share))]
        cells += [""] * (2 * self._top - len(cells))
        self._line([csv_cell(prediction.path), *cells, csv_cell(prediction.error)])

    def _line(self, cells: list[str]) -> None:
        csv.writer(_Encoded(self._file), lineterminator="\n").writerow(cells)


class _Encoded:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode())


class JsonRows(_Lines):
    """{"file": ..., "classes": [[name, probability], ...], "error": ..., "embedding": [...] or null} a line, in ASCII."""

    def write(self, prediction: Prediction) -> None:
        row: dict[str, Any] = {"file": prediction.path, "classes": prediction.classes, "error": prediction.error}
        if self._embed:
            row["embedding"] = None if prediction.embedding is None else prediction.embedding.tolist()
        self._file.write(json.dumps(row).encode() + b"\n")


class ParquetRows:
    """The columns of a .csv, names as they are, and embedding: list<float>; an image that cannot be used has null in them."""

    def __init__(self, file: IO[bytes], top: int, *, embed: bool) -> None:
        import pyarrow as pa

        self._file, self._top, self._waiting = file, top, list[Prediction]()
        columns: dict[str, Any] = {"file": pa.string()}
        for rank in range(1, top + 1):
            columns |= {f"class_{rank}": pa.string(), f"probability_{rank}": pa.float64()}
        columns["error"] = pa.string()
        if embed:
            columns["embedding"] = pa.list_(pa.float32())
        self._schema = pa.schema(list(columns.items()))
        self._writer: pq.ParquetWriter | None = None

    def write(self, prediction: Prediction) -> None:
        self._waiting.append(prediction)
        if len(self._waiting) == _ROW_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, self._schema)
        rows, self._waiting = self._waiting, []
        columns: list[Any] = [[utf8(row.path) for row in rows]]
        for rank in range(self._top):
            found = [row.classes[rank] if row.classes else (None, None) for row in rows]
            columns += [[name and utf8(name) for name, _ in found], [share for _, share in found]]
        columns += [[utf8(row.error) for row in rows], [row.embedding for row in rows]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=False)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        try:
            if self._waiting or self._writer is None:
                self._write_group()
        finally:
            if self._writer is not None:
                self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


KINDS: dict[str, Callable[..., Rows]] = {".csv": CsvRows, ".jsonl": JsonRows, ".parquet": ParquetRows}


def csv_cell(text: str) -> str:
    """`text` for a cell: unprintable characters escaped as show_name has them, and an apostrophe before one that is a formula."""
    shown = show_name(text)
    return f"'{shown}" if text.startswith(_FORMULA) else shown


def utf8(name: str) -> str:
    """`name`, in which a byte XX that is no UTF-8 becomes the text \\udcXX."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_output(output: str, *, embed: bool) -> None:
    """Raise UserError where predictions cannot be written to `output`, as far as the names and packages tell."""
    suffix = Path(output).suffix.lower()
    require(suffix in KINDS, "output", output, f"must end in {', '.join(KINDS)}; give another name")
    rule = "does not fit into the cells of a .csv; give --output a .parquet or a .jsonl"
    require(not (embed and suffix == ".csv"), "embed", embed, rule)
    require(
        not os.path.lexists(output), "output", output, "already exists and is never overwritten; give another --output"
    )
    if suffix == ".parquet" and (missing := missing_extra("parquet", ["pyarrow"], "a .parquet file")):
        raise UserError(missing)


class Output:
    """The file that predictions go to. As a context: its end gives the file its name, an error keeps the rows written so far.

    Raises UserError as check_output(), where another process writes to it, and where it cannot be made.
    """

    def __init__(self, path: str, *, embed: bool) -> None:
        check_output(path, embed=embed)
        rule = (
            "is written by one process; start predict without torchrun, and give each process its share of the images"
        )
        require(read_launch().size == 1, "ranks", read_launch().size, rule)
        self.path, self._embed = Path(path), embed
        self.partial = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        self.count = self.errors = 0
        self._rows: Rows | None = None
        try:
            self._file = open(self.partial, "xb")  # noqa: SIM115 (closed by Rows, or by __exit__)
        except FileExistsError as error:
            rule = "has the predictions of a command that was stopped, or still runs; move it away, or give another --output"
            raise ConfigError(f"output = {path!r}: {str(self.partial)!r} {rule}") from error
        except OSError as error:
            rule = f"must be a place to write to; give another ({error.strerror})"
            raise ConfigError(f"output = {path!r}: {rule}") from error

    def begin(self, top: int) -> None:
        """Write rows of `top` classes from here on."""
        self._rows = KINDS[self.path.suffix.lower()](self._file, top, embed=self._embed)

    def written(self, prediction: Prediction) -> Prediction:
        """`prediction`, which is a row of the file now. Raises OSError."""
        assert self._rows is not None, "begin() comes first"
        self._rows.write(prediction)
        self.count += 1
        self.errors += bool(prediction.error)
        return prediction

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is None and self._rows is not None:
            self._finish()
            return
        kept = self._keep()
        if kept and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        if kept:
            print(show_name(f"note: {kept}"), file=sys.stderr, flush=True)

    def _finish(self) -> None:
        assert self._rows is not None
        try:
            self._rows.close()
            taken = os.path.lexists(self.path)
            if not taken:
                os.rename(self.partial, self.path)
        except OSError:
            if kept := self._keep():
                print(show_name(f"note: {kept}"), file=sys.stderr, flush=True)
            raise
        if taken:
            rule = (
                f"was made by another program in the course of this one; the predictions are in {str(self.partial)!r}"
            )
            raise ConfigError(f"output = {str(self.path)!r}: {rule}")

    def _keep(self) -> str:
        """Close the partial file. Returns the words on its rows; empty where it has none, and is removed."""
        kept, lines = self.count, not isinstance(self._rows, ParquetRows)
        try:
            if self._rows is not None and self.count:
                self._rows.close()
        except (OSError, ValueError):  # a full disk; pyarrow refuses to write to a file that failed
            kept = _cut_to_lines(self.partial) - isinstance(self._rows, CsvRows) if lines else 0
        with contextlib.suppress(OSError):
            self._file.close()
        if kept > 0:
            return f"the predictions of the first {kept:,} images are in {self.partial}"
        self.partial.unlink(missing_ok=True)
        return (
            "no prediction is kept: a .parquet is read by its end; a .csv or .jsonl keeps its rows"
            if self.count
            else ""
        )


def _cut_to_lines(path: Path) -> int:
    """Cut the file after its last line break. Returns its number of lines."""
    with open(path, "r+b") as file:
        lines = size = 0
        for line in file:
            if line.endswith(b"\n"):
                lines, size = lines + 1, size + len(line)
        file.truncate(size)
    return lines
