"""Places365-Standard as its lists describe it: categories_places365.txt, places365_train_standard.txt and places365_val.txt.

They are in the archive filelist_places365-standard, and lie in ROOT beside the folders of images, as torchvision unpacks them.
The archive "easyformat" has class folders, which folder.py reads: the same classes in the same order. No torch, no DALI.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from fasttricks.config import DataConfig, show_name
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import ImageFolder
from fasttricks.data.sources.table import images_of, plain_path, sorted_rows
from fasttricks.data.sources.walk import any_in
from fasttricks.system.reading import Reader, is_there

CATEGORIES = "categories_places365.txt"
LISTS = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
FOLDERS = {
    "train": ("data_256", "data_256_standard", "data_large", "data_large_standard"),
    "val": ("val_256", "val_large"),
}
"""The folder of each split's images: as the archives of 256 pixels and of full size have it, and as torchvision renames it."""
_MEND = "take the file of filelist_places365-standard.tar"
_LINES = Reader(DataError, "must have a name and a number in each line", _MEND)


def is_places365(config: DataConfig, split: str) -> bool:
    """Whether data.root has the categories and one of the lists, and no folder of the split, whose class folders would count."""
    root = Path(config.root)
    return any_in(root, *LISTS.values()) and any_in(root, CATEGORIES) and not any_in(root, split)


def places365_holds(config: DataConfig, split: str) -> bool:
    """Whether data.root has the list of that split. Raises DataError where the folder of its images is not there, or is twice."""
    root = Path(config.root)
    if not is_there(root / LISTS[split]):
        return False
    _folder(root, split)
    return True


def open_places365(config: DataConfig, split: str, classes: tuple[str, ...] | None) -> ImageFolder:
    """The images of the list of that split, named by their paths in its folder; the lists number the classes.

    Raises DataError as places365_holds and table.images_of, and with its line for a line without a name and a number, a number
    that is no category, a path twice or that leads out of the folder, and where a category has no training image.
    Cost: as table.open_table.
    """
    root = Path(config.root)
    folder, names, place = _folder(root, split), _categories(root), root / LISTS[split]
    found: list[tuple[str, str, int]] = []
    lines: dict[str, int] = {}
    for line, path, number in _numbered(place):
        if number >= len(names):
            raise _refusal(place, line, f"category {number}: {CATEGORIES} has 0 to {len(names) - 1}")
        try:
            file = plain_path(path.lstrip("/"))
        except ValueError as error:
            raise _refusal(place, line, error) from error
        if (first := lines.setdefault(file, line)) != line:
            raise _refusal(place, line, f"{show_name(file)} is in line {first} too")
        found.append((names[number], file, line))
    missing = set(names) - {name for name, _, _ in found} if split == "train" else set()
    if missing or not found:
        wrong = f"has no image of {show_name(min(missing))}" if missing else "has no line"
        raise DataError(f"{place}: {wrong}; {_MEND}")
    mend = f"unpack the images into {root / folder}"
    images = images_of(sorted_rows(found), root, f"{folder}/", place, split, classes or names, mend=mend)
    return dataclasses.replace(images, numbered=True)


def _folder(root: Path, split: str) -> str:
    """The folder of the split's images. Raises DataError where none is there, or several are."""
    there = [name for name in FOLDERS[split] if (root / name).is_dir()]
    if len(there) == 1:
        return there[0]
    if there:
        way_out = "leave one of them in it"
        raise DataError(
            f"{root}: holds {' and '.join(there)}, and the images of {split} must be in one folder; {way_out}"
        )
    archives = {"train": "train_256_places365standard.tar", "val": "val_256.tar"}
    rule = f"has {LISTS[split]}, but none of {', '.join(FOLDERS[split])} with its images"
    raise DataError(f"{root}: {rule}; unpack {archives[split]} in it")


def _categories(root: Path) -> tuple[str, ...]:
    """The names of the classes by number, as the class folders of the easyformat: /a/arena/hockey is arena-hockey."""
    path = root / CATEGORIES
    names: list[str] = []
    for line, category, number in _numbered(path):
        parts = category.split("/")
        if len(parts) < 3 or parts[0] or not all(parts[1:]):
            raise _refusal(path, line, f"{show_name(category)}: must be as /a/airfield")
        name = "-".join(parts[2:])
        if number != len(names):
            raise _refusal(path, line, f"number {number}: must be {len(names)}, one more than the line before")
        if name in names:
            raise _refusal(path, line, f"{show_name(name)} is category {names.index(name)} too")
        names.append(name)
    if not names:
        raise DataError(f"{path}: has no line; {_MEND}")
    return tuple(names)


def _numbered(path: Path) -> Iterator[tuple[int, str, int]]:
    """(line, name, number) of each line, the first is line 1. Raises DataError."""
    for line, content in enumerate(_LINES.each_line(path), 1):
        try:
            name, number = content.decode("utf-8").split()
        except ValueError as error:  # UnicodeDecodeError too
            raise _refusal(path, line, "must have a name, a space and a number") from error
        if not (number.isascii() and number.isdigit() and len(number) < 10) or "\0" in name:
            raise _refusal(path, line, f"{show_name(number)}: must be the number of a category")
        yield line, name, int(number)


def _refusal(path: Path, line: int, wrong: object) -> DataError:
    return DataError(f"{path}: line {line}: {wrong}; {_MEND}")
