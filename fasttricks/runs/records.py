"""The records of a run, metrics.jsonl, read back. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttricks.config import ConfigError
from fasttricks.system.reading import Reader, is_there, parse_json
from fasttricks.system.schema import fields, number, whole

METRICS = "metrics.jsonl"
METRICS_FILES = Reader(
    ConfigError,
    'must have a record {"step": number, "epoch": number, ...} in each line',
    "repair it, or move it away: the run then resumes without its earlier records",
    max_bytes=1 << 16,
)
_RECORD = fields({"step": whole(), "epoch": number(finite=True)}, others=number())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl up to the first that is none, as a kill leaves the last line torn; none without the file.

    Raises ConfigError where it is no regular file.
    """
    return [record for record, _ in each_record(folder / METRICS)]


def each_record(path: Path, *, whole: bool = False) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each record and its line, one at a time: a run may log millions of steps, more than memory should hold.

    It ends before the first line that is no record; whole: raises ConfigError there, unless it is the torn last line.
    """
    for count, line in enumerate(METRICS_FILES.each_line(path) if is_there(path) else (), 1):
        try:
            yield parse_json(line, _RECORD), line
        except ValueError as error:
            if whole and line.endswith(b"\n"):
                raise METRICS_FILES.refusal(path, f"line {count}: {error}") from error
            return
