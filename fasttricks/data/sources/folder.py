"""Find the images of a data set and say what is wrong with it before training begins. No torch, no DALI.

A wrong layout is an error. A bad file is not: it is listed in ImageFolder.bad with the reason, and the loader puts another
image in its place (feed.py).

Layout: ROOT/train/<class>/<image> and ROOT/val/<class>/<image>; classes are numbered by sorted folder name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fasttricks.data.sources.errors import DataError, show_name, why_unreadable
from fasttricks.data.sources.headers import HEADER_BYTES, why_no_image
from fasttricks.data.sources.listed import ListedImages, Where
from fasttricks.data.sources.quarantine import QUARANTINE, read_quarantine

LAYOUT = "the layout is ROOT/train/<class>/<image> and ROOT/val/<class>/<image>"

_READ = [
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "png",
    "webp",
    "bmp",
    "tif",
    "tiff",
    "jp2",
    "j2k",
    "jpx",
    "pnm",
    "ppm",
    "pgm",
    "pbm",
]
_NOT_READ = ["gif", "heic", "avif"]
_EXTENSIONS = frozenset(_READ + _NOT_READ)
"""A file whose name ends so was meant to be an image."""
_CLUTTER = frozenset({"thumbs.db", "desktop.ini", QUARANTINE})
_CHUNK = 2048  # files a task of the header check: large enough that handing out tasks costs nothing
_NAMED = 5  # how many offenders an error names


@dataclass(frozen=True)
class ImageFolder(ListedImages):
    """The images of one split, each a file of `root`. `bad`: no image, or in the quarantine list."""

    def locate(self, index: int) -> Where:
        """The whole file of image `index`."""
        return Where(f"{self.root}{os.sep}{self.files[index]}")


def scan_folder(root: Path | str, *, classes: Sequence[str] | None = None) -> ImageFolder:
    """The images in the class folders of `root`, sorted by class and then by name, each checked to be an image.

    Args:
        root: folder with one folder of images a class, such as DATA/train. Class folders are searched one level deep.
        classes: class names that the labels follow, those of train for a val folder, which may lack some but not add
            any.
            None: the sorted names of the folders.

    A file is an image if its first bytes say so; the pixels are not decoded. One that is none is in `bad` if its name is
    an image's or the quarantine list has it, and skipped, as hidden files, Thumbs.db and desktop.ini are, if not: with a
    warning that counts them.

    Raises DataError for: no such folder, not a folder, empty, no class folders, files beside them, folders in a class
    folder, a class folder without a good image, a class that is not in `classes`, a damaged quarantine list.

    Cost: one directory listing a class and one read of 12 bytes a file, in threads.
    """
    root = Path(root)
    folders, loose, skipped = _list_root(root)
    if not folders:
        raise DataError(f"{root}: {_loose_files(loose)}, but no class folders; {LAYOUT}")
    if loose:
        raise DataError(f"{root}: {_names(loose)} lies beside the class folders; move it into one or away")
    known = tuple(folders) if classes is None else tuple(classes)
    index = {name: label for label, name in enumerate(known)}
    strangers = [name for name in folders if name not in index]
    if strangers:
        raise DataError(
            f"{root}: class folder {_names(strangers)} has no counterpart in train, which has {len(known)} classes; "
            f"add it there or remove it here"
        )
    files: list[str] = []
    labels: list[int] = []
    bad: dict[int, str] = {}
    quarantined = read_quarantine(root)
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        # map() keeps the order, so that the result does not depend on which thread ends first
        found = list(pool.map(lambda name: _list_class(root, name), folders))
        reasons = pool.map(lambda part: _reasons(root, part), _chunks([file for part, _ in found for file in part]))
        reason = {file: why for part in reasons for file, why in part.items()} | quarantined
        for name, (listed, hidden) in zip(folders, found, strict=True):
            kept = [file for file in listed if file not in reason or named_image(file) or file in quarantined]
            worst = {len(files) + at: reason[file] for at, file in enumerate(kept) if file in reason}
            if len(worst) == len(kept):
                why = f" ({show_name(listed[0])}: {reason[listed[0]]})" if listed else ""
                way_out = "add images or remove the folder"
                raise DataError(f"{root / name}: class folder with no image in it{why}; {way_out}")
            bad |= worst
            files += kept
            labels += [index[name]] * len(kept)
            skipped += [file for file in listed if file not in set(kept)] if len(kept) < len(listed) else []
            skipped += hidden
    if skipped:
        what = f"{len(skipped)} hidden or system files, or files without an image's name and content"
        warnings.warn(f"{root}: skipped {what} ({_names(skipped)})", stacklevel=2)
    return ImageFolder(root=root, classes=known, files=tuple(files), labels=tuple(labels), bad=bad)


def scan_dataset(root: Path | str) -> tuple[ImageFolder, ImageFolder]:
    """(train, val) of the data set at `root`, labelled by the classes of train. Raises DataError as scan_folder."""
    train = open_folder(str(root), "train", None)
    return train, open_folder(str(root), "val", train.classes)


def open_folder(root: str, split: str, classes: tuple[str, ...] | None) -> ImageFolder:
    """The images of ROOT/SPLIT; of train only where val is there too. Raises DataError as scan_folder."""
    if split == "train":
        _check_layout(Path(root))
    return scan_folder(Path(root, split), classes=classes)


def _check_layout(root: Path) -> None:
    """Raise DataError where `root` is no folder with train/ and val/ in it."""
    if not root.exists():
        raise DataError(f"{root}: no such folder; give the folder that holds train/ and val/ as --data.root")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; give the folder that holds train/ and val/ as --data.root")
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        there = _names(sorted(os.listdir(root))) or "nothing"
        raise DataError(f"{root}: no folder {' and no folder '.join(missing)} in it (there is {there}); {LAYOUT}")


def _list_root(root: Path) -> tuple[list[str], list[str], list[str]]:
    """(sorted folder names, sorted loose files, hidden entries skipped)."""
    if not root.exists():
        raise DataError(f"{root}: no such folder; {LAYOUT}")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; {LAYOUT}")
    folders, loose, skipped = [], [], []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name == QUARANTINE:
                continue
            if is_clutter(entry.name):
                skipped.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
            else:
                loose.append(entry.name)
    if not folders and not loose:
        raise DataError(f"{root}: the folder is empty; {LAYOUT}")
    return sorted(folders), sorted(loose), skipped


def _list_class(root: Path, name: str) -> tuple[list[str], list[str]]:
    """(sorted paths relative to root of the files in a class folder, hidden entries skipped)."""
    kept: list[str] = []
    skipped: list[str] = []
    with os.scandir(root / name) as entries:
        for entry in entries:
            path = f"{name}/{entry.name}"
            if not named_image(path) and _is_folder(entry) and not is_clutter(entry.name):
                raise DataError(f"{root}: {show_name(path)} is a folder inside a class folder; {LAYOUT}")
            (skipped if is_clutter(entry.name) else kept).append(path)
    return sorted(kept), sorted(skipped)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is passed over: hidden, or a system's."""
    return name.startswith(".") or name.lower() in _CLUTTER


def named_image(path: str) -> bool:
    """Whether a file of this name was meant to be an image."""
    return path.rpartition(".")[2].lower() in _EXTENSIONS


def _chunks(files: list[str]) -> Iterator[list[str]]:
    source = iter(files)
    while part := list(islice(source, _CHUNK)):
        yield part


def _reasons(root: Path, files: list[str]) -> dict[str, str]:
    """Those of `files` that are no images, and why."""
    base = f"{root}{os.sep}"
    found = ((file, _why_bad(base + file)) for file in files)
    return {file: why for file, why in found if why is not None}


def _why_bad(path: str) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return why_unreadable(error)
    try:
        return why_no_image(os.read(descriptor, HEADER_BYTES))
    except OSError as error:  # a folder with an image's extension
        return why_unreadable(error)
    finally:
        os.close(descriptor)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(show_name, names[:_NAMED])) + more


def _loose_files(loose: Sequence[str]) -> str:
    return f"{len(loose)} files lie directly in it ({_names(loose)})"
