"""The checkpoints of a run folder as files: names, and which are kept. No torch: a wrong path is answered at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fasttricks.config import TIMM, TORCHVISION, UserError
from fasttricks.system.files import remove_leftovers, temporary_of
from fasttricks.system.reading import is_there, read_range, regular_file

_NAME = re.compile(r"step-(\d{10,})\.pt")
"""The names that checkpoint_path() makes. A file of any other name is the user's: it is neither read nor removed."""
_DAMAGED = ".damaged"
RAW = ":raw"
"""Ends a name whose weights shall be those of the training, and not their average."""
BEST = "@best"
"""Ends the name of a run folder whose best checkpoint shall be taken, and not the newest."""
BEST_FILE = "best.pt"
"""The checkpoint of the best validation, beside the numbered ones."""
EXPORTED = "model.safetensors"
"""The weights in an export's folder."""
CHECKSUM_MARK = b"\nfasttricks-sha256\n"
"""Stands between torch's bytes and their SHA-256 at the end of a checkpoint."""
TRAILER_BYTES = len(CHECKSUM_MARK) + hashlib.sha256().digest_size


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used."""


class DamagedError(CheckpointError):
    """A file that is not, or no longer, as it was written."""


def find_checkpoint(path: Path) -> Path:
    """The file that `path` names: itself, the newest checkpoint of a run folder, or, for RUN@best, its best.

    Raises CheckpointError for any other path.
    """
    if (folder := run_of_best(path)) is not None:
        return _best(folder)
    file = newest_checkpoint(path / "checkpoints") if path.is_dir() else path
    if file is None or not is_there(file):
        rule = "must be a file, or a run folder with checkpoints/step-NUMBER.pt; check the path"
        raise CheckpointError(f"checkpoint = {str(path)!r}: {rule}")
    return file


def run_of_best(path: Path) -> Path | None:
    """The run folder of RUN@best; None for any other path, also of a file or folder that has such a name."""
    if not path.name.endswith(BEST) or os.path.lexists(path):
        return None
    return path.with_name(path.name.removesuffix(BEST)) if path.name != BEST else path.parent


def _best(folder: Path) -> Path:
    file = folder / "checkpoints" / BEST_FILE
    if not is_there(file):
        why = "is no run folder" if not folder.is_dir() else "has no best checkpoint: none was saved after a validation"
        way_out = "check the path" if not folder.is_dir() else f"leave out {BEST}, for its newest"
        raise CheckpointError(f"checkpoint = {f'{folder}{BEST}'!r}: {folder} {why}; {way_out}")
    return file


def require_weights(name: str) -> None:
    """Raise CheckpointError where `name` is a path without weights: of a run, a checkpoint, an export or any file. Reads none."""
    if name and not name.startswith((TIMM, TORCHVISION)):
        find_weights(Path(name.removesuffix(RAW)))


def find_weights(path: Path) -> Path:
    """The file that `path` names: that of an export's folder, or as find_checkpoint, whose errors it raises."""
    return path / EXPORTED if is_export(path) else find_checkpoint(path)


def is_export(path: Path) -> bool:
    """Whether `path` is the folder of an export."""
    return (path / EXPORTED).is_file()


def is_own(file: Path) -> bool:
    """Whether a regular file ends as save_checkpoint() ends one. Raises OSError."""
    with regular_file(file) as (descriptor, size):
        return CHECKSUM_MARK in read_range(descriptor, max(0, size - 2 * TRAILER_BYTES), 2 * TRAILER_BYTES)


@contextlib.contextmanager
def named(field: str, way_out: str = "") -> Iterator[None]:
    """A CheckpointError in the block is said to be of this field of the config, with the way out."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}{way_out and f'; {way_out}'}") from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first: the files whose name is as checkpoint_path() makes it, by number."""
    return [path for path in named_checkpoints(folder) if path.is_file()]


def named_checkpoints(folder: Path) -> list[Path]:
    """The same, with other things of such a name, which a resumed run has to name and to move away.

    None of a folder that is not there. Raises OSError for one that cannot be listed.
    """
    try:
        names = os.listdir(folder)  # glob() would pass over a folder that cannot be read
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (folder / name for name in names if _NAME.fullmatch(name))
    return sorted((path for path in found if path == checkpoint_path(folder, step_of(path))), key=step_of, reverse=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, or None."""
    return next(iter(checkpoints(folder)), None)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return folder / f"step-{step:010d}.pt"


def step_of(path: Path) -> int:
    """The updates that were done when the checkpoint at `path` was saved."""
    return int(path.stem.removeprefix("step-"))


def keep_newest(folder: Path, count: int, also: Callable[[int], bool] = lambda step: False) -> None:
    """Delete the checkpoints of `folder` but the newest `count`, 1 or more, and the newest whose step `also` says yes to.

    Removes the temporary files of killed saves too. The user's files stay, whatever their names.
    """
    found = checkpoints(folder)
    marked = next((path for path in found if also(step_of(path))), None)
    for path in found[count:]:
        if path != marked:
            path.unlink()
    remove_leftovers(folder, _NAME.pattern)


def keep_copy(path: Path, name: str, *, again: bool = False) -> Path:
    """Keep the checkpoint `path` under another name beside it, which keep_newest() leaves alone. Takes no room where it can.

    again: in the place of a file that has that name, which is there until then; else that one stays. Raises OSError where it
    cannot be written.
    """
    kept, temporary = path.with_name(name), temporary_of(path.with_name(name))
    if again or not os.path.lexists(kept):
        temporary.unlink(missing_ok=True)  # of a process that was killed
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, kept)
        temporary.unlink(missing_ok=True)  # rename() leaves both where both are one file
    return kept


def set_aside(paths: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they neither count as one that is kept nor are tried again."""
    for path in paths:
        path.replace(path.with_name(path.name + _DAMAGED))
