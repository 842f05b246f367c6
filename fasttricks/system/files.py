"""Files that are written whole or not at all. No torch."""

from __future__ import annotations

import os
from pathlib import Path


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
