"""The list of bad files that `python -m fasttricks.data.prepare scan DIR` writes and training honours.

DIR is a data set, a split or a class folder.

DIR/quarantine.jsonl: one JSON object a line, {"file": path relative to DIR, "reason": words}. JSON escapes
new lines in a name, quotes, and bytes that are no UTF-8, which Python carries as lone surrogates (\\udc80 to \\udcff). Names are
compared as they are on the disk. A file that is not there any more does no harm. No torch, no DALI.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fasttricks.config import UserError
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import fields, text

QUARANTINE = "quarantine.jsonl"
QUARANTINED = "quarantined: "
"""The begin of the reason of an image that a list has."""


class QuarantineError(UserError):
    """A quarantine list that cannot be read or written."""


_RULE = 'must be {"file": path, "reason": words} in each line'
_LISTS = Reader(QuarantineError, _RULE, "make the list again with fasttricks.data.prepare scan", max_bytes=1 << 28)
_ENTRY = fields({"file": text(5000), "reason": text(10_000)})


def read_quarantine(root: Path, classes: Iterable[str] = ()) -> dict[str, str]:
    """Path relative to `root`, a split -> reason: of the list in `root`, of that in the folder above, which holds the splits,
    and of those in its class folders `classes`.

    Raises QuarantineError for a line that is not of the format.
    """
    above = {name: why for name, why in _read(root.parent).items() if name.startswith(f"{root.name}/")}
    below = {f"{folder}/{name}": why for folder in classes for name, why in _read(root / folder).items()}
    return {name[len(root.name) + 1 :]: why for name, why in above.items()} | _read(root) | below


def write_quarantine(root: Path, reasons: Mapping[str, str]) -> Path:
    """Write `reasons`, path relative to `root` -> reason, as the list in `root`; the old one is replaced as a whole, and
    removed where there are none.

    Raises QuarantineError where the folder cannot be written.
    """
    path = root / QUARANTINE
    temporary = root / f".{QUARANTINE}.{os.getpid()}"
    lines = [json.dumps({"file": name, "reason": why}) + "\n" for name, why in sorted(reasons.items())]
    try:
        if not lines:
            path.unlink(missing_ok=True)
            return path
        temporary.write_text("".join(lines), encoding="ascii")
        os.replace(temporary, path)
    except OSError as error:
        raise QuarantineError(f"{path}: cannot write it: {error.strerror}; make the folder writable") from error
    return path


def _read(root: Path) -> dict[str, str]:
    if not is_there(root / QUARANTINE):
        return {}
    return {entry["file"]: QUARANTINED + entry["reason"] for entry in _LISTS.lines(root / QUARANTINE, _ENTRY)}
