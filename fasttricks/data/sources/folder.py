"""Find the images of a data set and name its faults before training begins. No torch, no DALI.

A wrong layout is an error. A bad file is not: it is listed in ImageFolder.bad with the reason, and the loader puts another
image in its place (feed.py).

Layout: ROOT/train/<class>/<image> and ROOT/val/<class>/<image>, or ROOT/<class>/<image>, which is all train; classes are numbered
by sorted folder name. data.nested gives folders in class folders their meaning.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fasttricks.config import DataConfig, show_name
from fasttricks.data.sources.checked import find_bad, in_threads
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.listed import ListedImages, Where
from fasttricks.data.sources.quarantine import read_quarantine
from fasttricks.data.sources.walk import SPLITS, Listing, list_folder, why_none

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
_NAMED = 5  # how many offenders an error names


@dataclass(frozen=True)
class ImageFolder(ListedImages):
    """The images of one split, each a file of `root`. `bad`: no image, or in the quarantine list."""

    def locate(self, index: int) -> Where:
        """The whole file of image `index`."""
        return Where(f"{self.root}{os.sep}{self.files[index]}")


class _Class(NamedTuple):
    """The contents of a class, by paths relative to the root of the split."""

    files: list[str]
    hidden: list[str]
    """Passed over."""
    lists: list[str]
    """The folders that have a quarantine list."""
    inner: bool = False
    """Whether it has folders that are classes of their own, so that it needs no image."""


def scan_folder(root: Path | str, *, classes: Sequence[str] | None = None, nested: str = "error") -> ImageFolder:
    """The images in the class folders of `root`, sorted by class and then by name, each checked to be an image.

    Args:
        root: folder with one folder of images a class, such as DATA/train.
        classes: class names that the labels follow, those of train for a val folder, which may lack some but not add
            any.
            None: the sorted names of the folders.
        nested: as data.nested. A folder in a class folder is an error, belongs to that class (top), or is a class, CLASS/FOLDER
            (leaf), which the folders around it are where they hold images too. Below a class folder each folder is entered
            once, by its shortest name, the first of equals: links to it, and those to `root` or the folder above it, are skipped.

    A file is an image if its first bytes say so; the pixels are not decoded. One that is none is in `bad` if its name is
    an image's, and skipped, as hidden files, Thumbs.db and desktop.ini are, if not: with a warning that counts them.
    Quarantine lists change nothing in that: an image that one has is in `bad`, anything else that one has is as without.

    Raises DataError for: no such folder, not a folder, empty, no class folders, images beside them, folders in a class
    folder, a folder that cannot be listed, a class folder without a good image, a class that is not in `classes`, a
    damaged quarantine list.

    Cost: one directory listing a class and one read of 12 bytes a file, in threads, with a progress bar after 2 s. 1.3
    million names in 21,841 classes on a tmpfs, fingerprint too: 9 CPU seconds and 270 MB (tests/test_data_many.py).
    """
    root = Path(root)
    top = _list_root(root)
    if nested != "leaf":
        _require_known(root, top.folders, classes)
    outside = {top.identity, list_folder(root / os.pardir).identity} if nested != "error" else set()
    listings = in_threads(f"list {root.name}", top.folders, lambda name: _list_class(root, name, nested, outside))
    found = dict(sorted(one for listing in listings for one in listing.items()))
    every_file = chain.from_iterable(listing.files for listing in found.values())
    no_image = find_bad(root, every_file, sum(len(listing.files) for listing in found.values()))
    lists = [folder for listing in found.values() for folder in listing.lists]
    skipped = list(top.hidden)
    for name, listing in [(name, listing) for name, listing in found.items() if listing.inner]:
        if all(file in no_image and not named_image(file) for file in listing.files):
            skipped += [*listing.files, *listing.hidden]
            del found[name]
    if nested == "leaf":
        _require_known(root, list(found), classes)
    known = tuple(found) if classes is None else tuple(classes)
    index = {name: label for label, name in enumerate(known)}
    reasons = no_image | read_quarantine(root, lists)
    files: list[str] = []
    labels: list[int] = []
    bad: dict[int, str] = {}
    for name, (there, hidden, *_) in found.items():
        kept = [file for file in there if file not in no_image or named_image(file)]
        worst = {at: reasons[file] for at, file in enumerate(kept, len(files)) if file in reasons}
        if len(worst) == len(kept):
            why = f" ({there[0]}: {reasons[there[0]]})" if there else ""
            way_out = "add images or remove the folder"
            raise DataError(f"{root / name}: class folder with no image in it{why}; {way_out}")
        bad |= worst
        files += kept
        labels += [index[name]] * len(kept)
        if len(kept) < len(there):
            skipped += [file for file in there if file in no_image and not named_image(file)]
        skipped += hidden
    if skipped:
        kinds = f"{len(skipped)} hidden or system files, or files without an image's name and content"
        kinds += ", or links to a folder that is entered already" if nested != "error" else ""
        warnings.warn(f"{show_name(root)}: skipped {kinds} ({show_names(skipped)})", stacklevel=2)
    return ImageFolder(root=root, classes=known, files=tuple(files), labels=tuple(labels), bad=bad)


def open_folder(config: DataConfig, split: str, classes: tuple[str, ...] | None) -> ImageFolder:
    """The images of ROOT/SPLIT, or of ROOT as train where it has neither split. Raises DataError as scan_folder."""
    root = Path(config.root)
    place = root / split if os.path.lexists(root / split) else root
    return scan_folder(place, classes=classes, nested=config.nested)


def holds_folder(config: DataConfig, split: str) -> bool:
    """Whether the folder data.root has that split: ROOT/SPLIT, or as train the class folders of ROOT itself.

    Raises DataError where data.root or the split is no folder of class folders. Cost: a listing of both.
    """
    root = Path(config.root)
    if reason := why_none(root):
        raise DataError(f"{root}: {reason}; give the folder that holds train/ and val/ as --data.root")
    there = list_folder(root)
    splits = [name for name in SPLITS if name in (*there.folders, *there.files)]
    if split not in splits and (splits or split != "train"):
        return False
    _list_root(root / split if splits else root)
    return True


def _list_root(root: Path) -> Listing:
    """The contents of a split: class folders alone. A file beside them that was never an image, as a licence, is passed over."""
    if reason := why_none(root):
        raise DataError(f"{root}: {reason}; {LAYOUT}")
    there = list_folder(root)
    others = [name for name in there.files if not named_image(name)]
    if there.folders and others:
        never = find_bad(root, others, len(others))
        images = [name for name in there.files if name not in never]
        there = there._replace(files=images, hidden=sorted([*there.hidden, *never]))
    if there.folders and there.files:
        raise DataError(
            f"{root}: {show_names(there.files)} lies beside the class folders; move it into one, or out of the split"
        )
    if there.files:
        loose = f"{len(there.files)} files lie directly in it ({show_names(there.files)})"
        raise DataError(f"{root}: {loose}, but no class folders; {LAYOUT}")
    if not there.folders:
        raise DataError(f"{root}: the folder is empty; {LAYOUT}")
    return there


def _require_known(root: Path, names: list[str], classes: Sequence[str] | None) -> None:
    """Raise DataError where one of the `names` is none of the `classes` of train."""
    strangers = sorted(set(names) - set(classes)) if classes is not None else []
    if strangers:
        raise DataError(
            f"{root}: class folder {show_names(strangers)} has no counterpart in train, which has {len(classes or ())} classes; "
            f"add it there or remove it here"
        )


def _list_class(root: Path, name: str, nested: str, outside: set[tuple[int, int]]) -> dict[str, _Class]:
    """The classes of a class folder, by name. A folder named as an image is a file, which is bad.

    outside: folders that are not entered from here.
    """
    found: dict[str, _Class] = {}
    entered = set(outside)
    waiting = deque([name])
    while waiting:
        folder = waiting.popleft()
        there = list_folder(root / folder)
        owner = folder if nested == "leaf" else name
        if there.identity in entered and folder != name:
            found.setdefault(owner.rpartition("/")[0] or name, _Class([], [], [])).hidden.append(folder)
            continue
        entered.add(there.identity)
        inner = [f"{folder}/{one}" for one in there.folders if not named_image(one)]
        if inner and nested == "error":
            ways = f"--data.nested top takes its images for class {show_name(name)}, leaf makes it a class of its own"
            raise DataError(f"{root}: {show_name(inner[0])} is a folder inside a class folder; {ways}; {LAYOUT}")
        waiting += inner
        images = sorted([*there.files, *(one for one in there.folders if named_image(one))])
        one = found.setdefault(owner, _Class([], [], []))
        one.files.extend(f"{folder}/{image}" for image in images)
        one.hidden.extend(f"{folder}/{file}" for file in there.hidden)
        one.lists.extend([folder] if there.quarantine else [])
        found[owner] = one._replace(inner=nested == "leaf" and bool(inner))
    for listing in found.values():
        listing.files.sort(key=lambda file: file.rpartition("/")[::2])  # by folder and then by name, as torchvision
    return found


def named_image(path: str) -> bool:
    """Whether a file of this name was meant to be an image."""
    return path.rpartition(".")[2].lower() in _EXTENSIONS


def show_names(names: Sequence[str]) -> str:
    """The first few names, and how many more there are; safe to print."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(show_name, names[:_NAMED])) + more
