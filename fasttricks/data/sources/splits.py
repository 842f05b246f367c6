"""The words for a split in names of files and folders and in a table, and the shards that they tell apart. No torch, no DALI."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TypeVar

from fasttricks.config import show_name
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import named_image
from fasttricks.data.sources.walk import is_folder
from fasttricks.system.refusals import way_out

SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Word, in lower case -> split. test stands in for val where there is no val (choose_val)."""
_LOOKED_INTO = 64
"""Folders of data.root in which shards are looked for, and images that make such a folder one of images: both may be many."""
_UNPACK = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
T = TypeVar("T")


def choose_val(place: Path, found: Mapping[str, T]) -> dict[str, T]:
    """`found`, by split, without test, which is val where there is no val; a warning says which."""
    chosen = {split: one for split, one in found.items() if split != "test"}
    if "test" in found:
        is_val = "val" not in found
        if is_val:
            chosen["val"] = found["test"]
        fate = "is taken for validation, as there is no val" if is_val else "is not read: val is there too"
        warnings.warn(f"{show_name(place)}: its split test {fate}", stacklevel=2)
    return chosen


def find_shards(root: Path, ending: str, *, nested: bool = False) -> dict[str, tuple[str, ...]]:
    """Split -> its files below `root` whose names end so, relative to `root`, sorted.

    A file in ROOT/SPLIT/ is of that split; in ROOT itself its name has the split for a word, as imagenet-train-0001.tar. A folder
    ROOT/SPLIT without such files has none, whatever lies beside it: it is of another kind. nested: where none is in those
    places, those of one other folder of ROOT count.
    Raises DataError for a name that has two splits, compressed tars, and several folders that have such files.
    Cost: a listing of ROOT, and of up to 64 of its folders as far as the 64th image.
    """
    here = _shards_in(root, "", ending)
    if here or not nested:
        return here
    folders = islice(_list(root)[0], _LOOKED_INTO)
    below = {name: _shards_in(root / name, f"{name}/", ending, most_images=_LOOKED_INTO) for name in folders}
    below = {name: shards for name, shards in below.items() if any(shards.values())}
    if len(below) > 1:
        rule = f"several folders hold files that end in {ending} ({', '.join(map(show_name, below))})"
        raise DataError(f"{root}: {rule}; give one of them, such as --data.root {root / min(below)}")
    return next(iter(below.values()), {})


def _shards_in(root: Path, prefix: str, ending: str, most_images: int | None = None) -> dict[str, tuple[str, ...]]:
    """As find_shards, of `root` alone."""
    folders, files = _list(root, most_images)
    found: dict[str, list[str]] = {}
    for folder in folders:
        if split := SPLIT_OF.get(folder.lower()):
            inside = [f"{prefix}{folder}/{name}" for name in _list(root / folder)[1] if _is_shard(name, ending)]
            found.setdefault(split, []).extend(inside)
    in_folders = set(found)
    for name in files:
        if not _is_shard(name, ending):
            continue
        splits = {SPLIT_OF[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_OF}
        if len(splits) > 1:
            raise DataError(f"{root / name}: the name has the splits {' and '.join(sorted(splits))}; leave one in it")
        for split in splits - in_folders:
            found.setdefault(split, []).append(prefix + name)
    for shard in (shard for shards in found.values() for shard in shards):
        if unpack := _UNPACK.get(os.path.splitext(shard)[1].lower()):
            rule = "compressed, so that an image is no range of its bytes"
            raise DataError(f"{root / shard.removeprefix(prefix)}: {rule}; unpack it once ({unpack} FILE)")
    return {split: tuple(sorted(shards)) for split, shards in found.items()}


def _is_shard(name: str, ending: str) -> bool:
    name = name.lower()
    return name.endswith(ending) or (ending == ".tar" and (name.endswith(".tgz") or f"{ending}." in name))


def _list(folder: Path, most_images: int | None = None) -> tuple[list[str], list[str]]:
    """(folders, files) in `folder`, sorted, without those that are named as images. It stops after so many images."""
    folders, files, images = [], [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if is_folder(entry):
                    folders.append(entry.name)
                elif named_image(entry.name):
                    images += 1
                    if images == most_images:
                        break
                else:
                    files.append(entry.name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return [], []  # for the reader of folders to say
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; {way_out(error)}") from error
    return sorted(folders), sorted(files)
