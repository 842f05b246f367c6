"""Images that a user names one by one, or by the folders that hold them: the source of predict. No torch, no DALI."""

from __future__ import annotations

import os
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fasttricks.config import show_name
from fasttricks.data.sources.checked import why_bad
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import named_image
from fasttricks.data.sources.listed import Where, read_at
from fasttricks.data.sources.walk import list_folder

_NAMED = 5  # how many of the skipped files a note names


class Paths(Sequence[str]):
    """Paths by number, each as the bytes of its name: a million strings would take some 100 MB more."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._names, self._ends = bytearray(), array("Q", [0])
        self._folders: list[str] = []
        self._firsts: list[int] = []
        """The number of the first path of each folder."""
        self.add("", paths)

    def add(self, folder: str, names: Iterable[str]) -> None:
        """Append folder + name for each of `names`."""
        if not self._folders or self._folders[-1] != folder:
            self._folders.append(folder)
            self._firsts.append(len(self))
        for name in names:
            self._names += os.fsencode(name)
            self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:  # type: ignore[override]  # nobody asks for a slice
        if not 0 <= number < len(self):
            raise IndexError(number)
        name = self._names[self._ends[number] : self._ends[number + 1]]
        return self._folders[bisect_right(self._firsts, number) - 1] + os.fsdecode(bytes(name))


@dataclass(frozen=True)
class ImageFiles:
    """A Source of files without classes: image `i` is the file `paths[i]`, and its label says nothing."""

    paths: Sequence[str]
    root = Path()
    classes = ("",)
    bad = MappingProxyType[int, str]({})

    @property
    def labels(self) -> Sequence[int]:
        """Zeros."""
        return array("q", bytes(8 * len(self.paths)))

    def __len__(self) -> int:
        return len(self.paths)

    def locate(self, index: int) -> Where:
        """The whole file of image `index`."""
        return Where(self.paths[index])

    def read(self, index: int) -> bytes:
        """The bytes of image `index`. From any thread. Raises OSError."""
        return read_at(self.locate(index))

    def name(self, index: int) -> str:
        """The path of image `index`."""
        return self.paths[index]

    def fingerprint(self) -> str:
        """The number of files: nobody resumes a prediction."""
        return str(len(self.paths))


def find_images(given: Iterable[str]) -> Paths:
    """The paths `given`, in order; a folder stands for the images in it and below: its own files, then its folders, by name.

    An image is a file whose name or first bytes say so. Hidden files and all others are skipped, with a warning that counts
    them. Links count as their targets; a folder with several names, as a loop of links makes them, is searched by the first.
    A path that is no folder is taken as an image, whatever it is. Raises DataError for a folder that cannot be listed and
    for one without an image. Cost: a listing a folder, a read of 12 bytes for a file without an image's name; no image is read.
    """
    found, skipped = Paths(), _Skipped()
    for path in given:
        if not os.path.isdir(path):
            found.add("", [path])
            continue
        before = len(found)
        for folder, names in _search(path, skipped):
            found.add(folder, names)
        if len(found) == before:
            raise DataError(f"{path}: no image in it, nor in a folder below; name a folder with images, or an image")
    skipped.say()
    return found


class _Skipped:
    def __init__(self) -> None:
        self._files, self._folders, self._named = 0, 0, list[str]()

    def file(self, path: str) -> None:
        self._files += 1
        self._name(path)

    def folder(self, path: str) -> None:
        self._folders += 1
        self._name(path)

    def _name(self, path: str) -> None:
        if len(self._named) < _NAMED:
            self._named.append(show_name(path))

    def say(self) -> None:
        kinds = f"{self._files} hidden or system files, or files without an image's name and content" * (
            self._files > 0
        )
        again = f"{self._folders} other names of folders that are searched already" * (self._folders > 0)
        if kinds or again:
            more = ", ..." if self._files + self._folders > len(self._named) else ""
            words = " and ".join(filter(None, (kinds, again)))
            warnings.warn(f"skipped {words} ({', '.join(self._named)}{more})", stacklevel=3)


def _search(root: str, skipped: _Skipped) -> Iterator[tuple[str, Iterator[str]]]:
    """(folder with a slash behind it, the names of its images) of `root` and each folder below, depth first."""
    entered: set[tuple[int, int]] = set()
    waiting = [os.path.join(root, "")]
    while waiting:
        folder = waiting.pop()
        there = list_folder(folder)
        if there.identity in entered:
            skipped.folder(folder)
            continue
        entered.add(there.identity)
        for name in there.hidden:
            skipped.file(folder + name)
        yield folder, _images(folder, there.files, skipped)
        waiting += [f"{folder}{name}/" for name in reversed(there.folders)]


def _images(folder: str, names: list[str], skipped: _Skipped) -> Iterator[str]:
    for name in names:
        if named_image(name) or why_bad(folder + name) is None:
            yield name
        else:
            skipped.file(folder + name)
