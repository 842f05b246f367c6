"""Files that are written whole or not at all, and the remains of a kill. No torch."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """The name, beside `path`, that this process writes it under before the rename."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files in `folder` of processes that are gone, for files whose whole name the pattern `name` matches.

    It removes temporary_of()'s names alone: every other file is the user's, and the file of a running process stays.
    """
    pattern = re.compile(rf"\.(?:{name})\.(?P<pid>\d+)\.tmp")
    for found in folder.iterdir():
        match = pattern.fullmatch(found.name)
        if match and (int(match["pid"]) == os.getpid() or not Path("/proc", match["pid"]).exists()):
            found.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, temporary: Path | None = None) -> None:
    """Write `content` to `path` so that a kill, a power cut or a full disk leaves the old file or the new one.

    temporary: the file that is renamed to it, in the same folder; a name of its own for each of several writers. None: .NAME.tmp.
    Raises OSError. Costs an fsync.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def why_refused(folder: Path) -> str:
    """The rule that a failed write to `folder` has broken, and the way out: the folder is gone, or else has no room."""
    if not folder.is_dir():
        return f"must be in a folder that stays during the run: {folder} was deleted, moved or unmounted; bring it back"
    return "must be on a disk with room that this process may write to; free some"


def check_writable(folder: Path) -> None:
    """Make `folder`, with its parents, and try a file there: for results that take minutes. Raises OSError with the path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-") as file:
        file.write(b"1")
