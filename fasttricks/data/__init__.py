"""Input pipeline: folders of images in, normalised channels-last batches on the device out.

`scan_dataset` (no torch, no DALI) finds and checks the files, `Loader` (DALI) decodes and augments them. `Loader` is
imported at first use, so that scanning a folder needs neither.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttricks.data.sources.folder import DataError, ImageFolder, scan_dataset, scan_folder
from fasttricks.data.sources.packed import PackedImages, is_packed, open_packed

if TYPE_CHECKING:
    from fasttricks.data.pipeline.loader import Loader

Images = ImageFolder | PackedImages
"""The images of a split, as folders of files or packed."""

__all__ = [
    "DataError",
    "ImageFolder",
    "Images",
    "Loader",
    "find_dataset",
    "find_root",
    "open_split",
    "scan_dataset",
    "scan_folder",
]


def find_root(root: str) -> Path:
    """The data set that data.root names: a folder, or the word demo for the embedded images, drawn at first use.

    Raises DataError for an empty name, and where the embedded images cannot be written.
    """
    if not root:
        rule = "must be the folder that holds train/ and val/, or the word demo"
        raise DataError(f"data.root = '': {rule}; give --data.root")
    if root != "demo":
        return Path(root)
    from fasttricks.data.sources.demo import make_demo

    try:
        return make_demo()
    except OSError as error:
        raise DataError(f"data.root = 'demo': {error}") from error


def find_dataset(root: str) -> tuple[Images, Images]:
    """(train, val) of what data.root names. Raises DataError as find_root, scan_dataset and open_packed do."""
    folder = find_root(root)
    if not is_packed(folder / "train"):
        return scan_dataset(folder)
    train = open_packed(folder / "train")
    return train, open_split(folder / "val", classes=train.classes)


def open_split(folder: Path, *, classes: tuple[str, ...] | None = None) -> Images:
    """The images of one split, in a folder a class or packed. Raises DataError as scan_folder and open_packed do."""
    return open_packed(folder, classes=classes) if is_packed(folder) else scan_folder(folder, classes=classes)


def __getattr__(name: str) -> Any:
    if name != "Loader":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fasttricks.data.pipeline.loader import Loader

    return Loader
