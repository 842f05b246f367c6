"""Images on disk, by number: the Protocol of a source, and the opening of the one that data.root names. No torch, no DALI.

A new kind of source is one new file here and one row of OPENERS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from fasttricks.config import DataConfig
from fasttricks.data.sources.class_order import CODEPOINT, NATURAL, order_classes, read_order
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import LAYOUT, holds_folder, open_folder, show_names
from fasttricks.data.sources.listed import ListedImages, Where, is_numbered
from fasttricks.data.sources.packed import is_packed, open_packed, require_finished
from fasttricks.data.sources.parquet import is_parquet, open_parquet, parquet_holds
from fasttricks.data.sources.table import names_table, open_table, table_holds
from fasttricks.data.sources.walk import list_folder
from fasttricks.data.sources.webdataset import is_webdataset, open_webdataset, webdataset_holds

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("val", "train")
Classes = tuple[str, ...] | None
"""The names that labels follow; None: those that the source has."""


class Source(Protocol):
    """The encoded images of one split, by number from 0 on. Its answers never change; it may be asked from any thread."""

    @property
    def root(self) -> Path:
        """Where they are: the folder or file of the split; data.root/SPLIT where that is no folder."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes, those of train for val too."""

    @property
    def labels(self) -> Sequence[int]:
        """labels[i] is the class of image i, 0 to len(classes) - 1."""

    @property
    def bad(self) -> Mapping[int, str]:
        """Images that are known beforehand not to be used, by number, and why."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image `index`. Raises OSError."""

    def locate(self, index: int) -> Where:
        """Where the bytes of image `index` lie, for a process that reads without the source."""

    def name(self, index: int) -> str:
        """The name of image `index`, CLASS/IMAGE, or in a table its path; no two share a name."""

    def fingerprint(self) -> str:
        """The same for the same names and labels in the same order, and for no others."""


class Opener(NamedTuple):
    """One kind of source."""

    recognises: Callable[[DataConfig, Split], bool]
    """Whether that split of data.root is of this kind, or would be if it were there."""
    holds: Callable[[DataConfig, Split], bool]
    """Whether data.root has that split. A place that is not divided is all train. Reads no list of images: milliseconds.
    Raises DataError for a place that open() would refuse, as far as that tells."""
    open: Callable[[DataConfig, Split, Classes], Source]
    """That split of data.root, which has it, labelled by the classes. Raises DataError."""


def _open_demo(config: DataConfig, split: Split, classes: Classes) -> Source:
    from fasttricks.data.sources.demo import open_demo  # draws with Pillow, which no other kind needs

    return open_demo(split, classes)


def _holds_packed(config: DataConfig, split: Split) -> bool:
    require_finished(Path(config.root, split))
    return True


OPENERS = [
    Opener(recognises=names_table, holds=table_holds, open=open_table),
    Opener(recognises=lambda config, split: config.root == "demo", holds=lambda config, split: True, open=_open_demo),
    Opener(
        recognises=lambda config, split: is_packed(Path(config.root, split)),
        holds=_holds_packed,
        open=lambda config, split, classes: open_packed(Path(config.root, split), classes=classes),
    ),
    Opener(recognises=is_webdataset, holds=webdataset_holds, open=open_webdataset),
    Opener(recognises=is_parquet, holds=parquet_holds, open=open_parquet),
    Opener(recognises=lambda config, split: True, holds=holds_folder, open=open_folder),
]
"""The kinds of source. The first that recognises a place opens it; the last takes any, and names its faults."""


def find_dataset(config: DataConfig) -> tuple[Source, Source]:
    """(train, val) of data.root: a place of a kind in OPENERS, or the word demo for the embedded images, drawn at first use.

    The classes, and so their labels, are in the order of data.class_order; the order of the images is the same in each.
    Raises DataError as open_split and order_classes.
    """
    require_place(config, "train", "val")
    train = open_split(config, "train")
    classes = _ordered(train, config.class_order)
    if classes != tuple(train.classes):
        # a listed source needs no second look at every file
        train = (
            train.relabelled(classes)
            if isinstance(train, ListedImages)
            else open_split(config, "train", classes=classes)
        )
    return train, open_split(config, "val", classes=train.classes)


def output_classes(config: DataConfig, count: int) -> tuple[str, ...]:
    """The names of the `count` outputs of a network that has none itself, in order.

    They are those of the file class_order; else those of val/ or train/ of data.root, whichever has as many, in that order;
    else, without data.root, the numbers from 0 on. Raises DataError where there are others, and as open_split.
    """
    way_out = "give --data.class-order FILE, with a class in each line in the order of the outputs"
    if config.class_order not in (CODEPOINT, NATURAL):
        names = read_order(config.class_order)
        if len(names) != count:
            rule = f"names {len(names)} classes, and the network has {count} outputs; {way_out}"
            raise DataError(f"data.class_order = {config.class_order!r}: {rule}")
        return tuple(names)
    if not config.root:
        return tuple(map(str, range(count)))
    found = []
    for split in SPLITS:
        if _opener(config, split).holds(config, split):
            images = open_split(config, split)
            if len(images.classes) == count:
                return _ordered(images, config.class_order)
            found.append(f"{split}/ has {len(images.classes)} classes")
    rule = f"{', '.join(found)}, and the network has {count} outputs; {way_out}"
    raise DataError(f"data.root = {config.root!r}: {rule}")


def _ordered(source: Source, class_order: str) -> tuple[str, ...]:
    return order_classes(source.classes, class_order, numbered=is_numbered(source))


def require_place(config: DataConfig, *splits: Split) -> None:
    """Raise DataError where the splits of data.root cannot be opened, as far as a look at the place tells.

    Reads no list of images: milliseconds. open_split says more.
    """
    for split in splits:
        if not _opener(config, split).holds(config, split):
            raise DataError(f"{config.root}: holds no {split}/{_beside(Path(config.root))}; {LAYOUT}")


def open_split(config: DataConfig, split: Split, *, classes: Classes = None) -> Source:
    """One split of data.root, labelled by `classes` where given.

    Raises DataError for an empty name, a split that is not there, images that break a rule of their kind (folder.py, packed.py),
    and where the embedded images cannot be written.
    """
    require_place(config, split)
    return _opener(config, split).open(config, split, classes)


def common_root(train: Source, val: Source) -> Path:
    """The folder or file that holds both."""
    return Path(os.path.commonpath([train.root, val.root]))


def _opener(config: DataConfig, split: Split) -> Opener:
    if not config.root:
        rule = "must be the folder that holds train/ and val/, or the word demo"
        raise DataError(f"data.root = '': {rule}; give --data.root")
    return next(opener for opener in OPENERS if opener.recognises(config, split))


def _beside(root: Path) -> str:
    """The names that are there in its place, in words."""
    if not root.is_dir():
        return ""
    there = list_folder(root)
    return f" (there is {show_names(sorted(there.folders + there.files + there.hidden))})"
