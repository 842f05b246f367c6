"""The contents of a folder of images: the one rule by which training lists, scan examines and packing reads. No torch, no DALI.

A link counts as its target. One that points nowhere, or in a circle, is a file that cannot be read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.quarantine import QUARANTINE
from fasttricks.system.reading import is_there
from fasttricks.system.refusals import way_out

SPLITS = ("train", "val")
_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "lost+found"})


class Listing(NamedTuple):
    """The contents of one folder, by name, each sorted."""

    folders: list[str]
    files: list[str]
    hidden: list[str]
    """Passed over: hidden, or a system's."""
    quarantine: bool
    """Whether a quarantine list is there."""
    identity: tuple[int, int]
    """Device and inode: the same folder by another name has the same."""


def list_folder(folder: Path | str) -> Listing:
    """The contents of `folder`. Raises DataError where it cannot be read, also without permission. Cost: two system calls
    a folder, and one a link."""
    folders: list[str] = []
    files: list[str] = []
    hidden: list[str] = []
    quarantine = False
    try:
        inside = os.stat(f"{folder}{os.sep}.")  # the dot asks whether its contents may be opened
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == QUARANTINE:
                    quarantine = True
                elif _is_clutter(entry.name):
                    hidden.append(entry.name)
                else:
                    (folders if is_folder(entry) else files).append(entry.name)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise DataError(f"{folder}: {error.strerror}; {way_out(error)}") from error
        rule = "must be a folder that this user may list and enter (chmod u+rx)"
        raise DataError(
            f"{folder}: {rule}, but: {error.strerror}; change that, or move it out of the data set"
        ) from error
    return Listing(sorted(folders), sorted(files), sorted(hidden), quarantine, (inside.st_dev, inside.st_ino))


def any_in(folder: Path, *names: str) -> bool:
    """Whether `folder` has one of the names. False where it cannot be entered, as list_folder says."""
    try:
        return any(is_there(folder / name) for name in names)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG):
            return False
        raise


def why_none(folder: Path) -> str:
    """Why that is no folder, in words; empty where it is one, also one that cannot be read, as list_folder says."""
    try:
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "no such folder"
    except OSError:
        return ""
    return "" if is_folder else "not a folder"


def is_dataset(root: Path) -> bool:
    """Whether both splits are there: the layout that training takes."""
    return all(os.path.isdir(root / split) for split in SPLITS)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one; a loop of links is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER
