"""Decode every image of a folder strictly, and name the damaged ones, for `fasttricks.data.prepare scan`.

No torch, no DALI.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from fasttricks.data.packing.pool import stopping, worker_pool
from fasttricks.data.packing.verdict import why_damaged
from fasttricks.data.sources.decode import quiet_pillow
from fasttricks.data.sources.errors import why_unreadable
from fasttricks.data.sources.folder import named_image
from fasttricks.data.sources.headers import HEADER_BYTES, image_format
from fasttricks.data.sources.listed import Where, read_at
from fasttricks.data.sources.quarantine import QUARANTINE
from fasttricks.data.sources.walk import SPLITS, is_dataset, list_folder

_CHUNK = 64  # files a task: a tenth of a second
_UNKNOWN_LEVELS = 2  # as in a data set


def scan_files(
    root: Path, files: list[str], *, workers: int, max_pixels: int, advance: Callable[[int], object]
) -> tuple[int, dict[str, str]]:
    """(images looked at, path relative to `root` -> reason, of the bad ones among `files`, which list_files gave).

    Those that have an image's name or first bytes are looked at, in `workers` processes; `advance` is called with how
    many files are done since the last time. A file that ends the process that decodes it is bad.
    """
    chunks = [files[at : at + _CHUNK] for at in range(0, len(files), _CHUNK)]
    bad: dict[str, str] = {}
    looked_at = 0
    again: list[list[str]] = []
    with worker_pool(workers) as pool:
        tasks = {pool.submit(_examine_files, str(root), chunk, max_pixels): chunk for chunk in chunks}
        for task in as_completed(tasks):
            try:
                count, found = task.result()
            except BrokenProcessPool:
                again.append(tasks[task])
                continue
            looked_at += count
            bad |= found
            advance(len(tasks[task]))
    for chunk in again:
        for name in chunk:
            count, found = _examine_alone(root, name, max_pixels)
            looked_at += count
            bad |= found
            advance(1)
    return looked_at, dict(sorted(bad.items()))


def list_files(root: Path) -> list[str]:
    """Paths, relative to `root`, of all files below it, sorted, hidden ones aside: each name by which training may take an
    image, whether `root` is a data set, a split or a class folder, and then whatever else lies there.

    Links are followed. A folder that has several names is listed by each that may be a class folder's, three levels deep where
    it is unknown which is; further below once in each of them, as data.nested enters it; beside train/ and val/ once. A folder
    in a class folder that is named as an image is a file: none that can be read. Raises DataError for a folder that cannot be
    listed.
    """
    class_level = _class_level(root)
    deepest = _UNKNOWN_LEVELS if class_level is None else class_level
    beside = is_dataset(root)
    files: list[str] = []
    aside: set[tuple[int, int]] = set()
    named: deque[tuple[str, int, frozenset[tuple[int, int]]]] = deque([("", 0, frozenset())])
    once: deque[tuple[str, set[tuple[int, int]]]] = deque()
    while named:
        inside, level, above = named.popleft()
        there = list_folder(root / inside)
        if there.identity in above:
            continue
        aside.add(there.identity)
        within = {*above, there.identity}
        files += [inside + name for name in there.files]
        for name in there.folders:
            if level == class_level and named_image(name):
                files.append(inside + name)
            elif beside and level == 0 and name not in SPLITS:
                once.append((f"{inside}{name}/", aside))
            elif level < deepest:
                named.append((f"{inside}{name}/", level + 1, above | {there.identity}))
            else:
                once.append((f"{inside}{name}/", within))
    while once:
        inside, entered = once.popleft()
        there = list_folder(root / inside)
        if there.identity in entered:
            continue
        entered.add(there.identity)
        files += [inside + name for name in there.files]
        once += [(f"{inside}{name}/", entered) for name in there.folders]
    return sorted(files)


def other_lists(root: Path, files: Iterable[str]) -> list[Path]:
    """The quarantine lists that training honours beside that of `root`, whose `files` list_files gave: above and below it."""
    place, level = Path(os.path.abspath(root)), _class_level(root)
    above = list(place.parents)[: {1: 1, 0: 2}.get(level if level is not None else -1, 0)]
    folders = {folder for file in files for folder in _first_folders(file)}
    if is_dataset(root):
        folders = {folder for folder in folders if folder.partition("/")[0] in SPLITS}
    places = (*above, *(root / folder for folder in sorted(folders)))
    return [folder / QUARANTINE for folder in places if os.path.lexists(folder / QUARANTINE)]


def _first_folders(file: str) -> Iterator[str]:
    """The first two folders of a path, as far as it has them: in a data set, the split and the class folder."""
    first, _, rest = file.partition("/")
    second, _, more = rest.partition("/")
    if rest:
        yield first
    if more:
        yield f"{first}/{second}"


def _class_level(root: Path) -> int | None:
    """How far below `root` the class folders of training are, by the names of the folders; None where they do not tell."""
    place = Path(os.path.abspath(root))
    known = {2: is_dataset(root), 1: place.name in SPLITS, 0: place.parent.name in SPLITS}
    return next((level for level, holds in known.items() if holds), None)


def _examine_files(root: str, names: list[str], max_pixels: int) -> tuple[int, dict[str, str]]:
    """(how many are images or named so, the bad ones and why). In a process of its own."""
    quiet_pillow()
    count, bad = 0, {}
    for name in names:
        if stopping():
            break
        try:
            file = read_at(Where(f"{root}{os.sep}{name}"))
        except OSError as error:
            if not named_image(name):
                continue
            reason = why_unreadable(error)
        else:
            if image_format(file[:HEADER_BYTES]) is None and not named_image(name):
                continue
            reason = why_damaged(file, max_pixels)
        count += 1
        if reason:
            bad[name] = reason
    return count, bad


def _examine_alone(root: Path, name: str, max_pixels: int) -> tuple[int, dict[str, str]]:
    with worker_pool(1) as pool:
        try:
            return pool.submit(_examine_files, str(root), [name], max_pixels).result()
        except BrokenProcessPool:
            return 1, {name: "ends the process that decodes it"}
