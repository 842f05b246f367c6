"""Files that are written whole or not at all, and what a kill leaves of them. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """What this process writes `path` under, beside it, before it is renamed."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what processes that are gone left in `folder` of files whose whole name the pattern `name` matches.

    Of temporary_of()'s names alone: whatever else lies there is the user's, and what another process is writing stays.
    """
    pattern = re.compile(rf"\.(?:{name})\.(?P<pid>\d+)\.tmp")
    for found in folder.iterdir():
        match = pattern.fullmatch(found.name)
        if match and (int(match["pid"]) == os.getpid() or not Path("/proc", match["pid"]).exists()):
            found.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes, temporary: Path | None = None) -> None:
    """Write `content` to `path` so that a kill, a power cut or a full disk leaves the old file or the new one.

    temporary: what is renamed to it, in the same folder; a name of its own for each of several writers. None: .NAME.tmp.
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
        return f"must be in a folder that stays while the run goes on: {folder} was deleted, moved or unmounted; bring it back"
    return "must be on a disk with room that this process may write to; free some"
