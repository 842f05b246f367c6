"""Images on disk, by number: the Protocol of a source, and the opening of the one that data.root names. No torch, no DALI.

A new kind of source is one new file here and one row of OPENERS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from fasttricks.config import DataConfig, show_name
from fasttricks.data.sources.class_order import CODEPOINT, NATURAL, order_classes, read_order
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import LAYOUT, holds_folder, open_folder, show_names
from fasttricks.data.sources.held_out import Part, hold_out, limit_classes
from fasttricks.data.sources.listed import ListedImages, Where, is_numbered
from fasttricks.data.sources.packed import is_packed, open_packed, require_finished
from fasttricks.data.sources.parquet import is_parquet, open_parquet, parquet_holds
from fasttricks.data.sources.places365 import is_places365, open_places365, places365_holds
from fasttricks.data.sources.table import names_table, open_table, table_holds
from fasttricks.data.sources.walk import list_folder
from fasttricks.data.sources.webdataset import is_webdataset, open_webdataset, webdataset_holds

_TO_HOLD_OUT = (
    "hold out a share of its images by --data.val-share 0.1 (evaluate takes all of them by 1), "
    "or write train/ and val/ down by `fasttricks data split DIR OUT`"
)
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
        """labels[i] is the class of image i, 0 to len(classes) - 1; of a source with an attribute `sets` (label_sets.Sets) that
        is not empty, the number of its set of classes there."""

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
    Opener(
        recognises=is_places365, holds=places365_holds, open=open_places365
    ),  # before tars: the archives may lie there too
    Opener(recognises=is_webdataset, holds=webdataset_holds, open=open_webdataset),
    Opener(recognises=is_parquet, holds=parquet_holds, open=open_parquet),
    Opener(recognises=lambda config, split: True, holds=holds_folder, open=open_folder),
]
"""The kinds of source. The first that recognises a place opens it; the last takes any, and names its faults."""


def find_dataset(config: DataConfig) -> tuple[Source, Source]:
    """(train, val) of data.root: a place of a kind in OPENERS, or the word demo for the embedded images, drawn at first use.

    The classes, and so their labels, are in the order of data.class_order; the order of the images is the same in each. A place
    without a val/ is divided by data.val_share; data.limit_per_class then leaves some of train. Raises DataError as open_split
    and order_classes.
    """
    require_place(config, "train", "val")
    train = _open(config, "train")
    train = _relabelled(train, _ordered(train, config.class_order))
    if config.val_share:
        rest, held = _divided(train, config)
        return _limited(rest, config), held
    return _limited(train, config), _open(config, "val", train.classes)


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
        if holds(config, split):
            images = _open(config, split)
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
    share = f"data.val_share = {config.val_share:g}"
    if config.val_share == 1 and "train" in splits:
        raise DataError(f"{share}: must be below 1 for training, to which 1 leaves no image; 0.1 is usual")
    held = {split: holds(config, split) for split in splits}
    if config.val_share and held.get("val"):
        rule = f"holds images out of a place without a val/, and {show_name(config.root)} has one; leave it out"
        raise DataError(f"{share}: {rule}")
    if config.val_share:
        held = {"train": holds(config, "train")}
    for split, there in held.items():
        if not there:
            way_out = LAYOUT if split == "train" else _TO_HOLD_OUT
            raise DataError(f"{show_name(config.root)}: holds no {split}/{_beside(Path(config.root))}; {way_out}")


def holds(config: DataConfig, split: Split) -> bool:
    """Whether data.root has that split itself. Raises DataError as require_place."""
    return _opener(config, split).holds(config, split)


def open_split(config: DataConfig, split: Split, *, classes: Classes = None) -> Source:
    """One split of data.root, labelled by `classes` where given; of a place without a val/ as data.val_share divides it.

    Raises DataError for an empty name, a split that is not there, images that break a rule of their kind (folder.py, packed.py),
    and where the embedded images cannot be written.
    """
    require_place(config, split)
    if not config.val_share:
        source = _open(config, split, classes)
        return _limited(source, config) if split == "train" else source
    rest, held = _divided(_open(config, "train", classes), config)
    return _limited(rest, config) if split == "train" else held


def _open(config: DataConfig, split: Split, classes: Classes = None) -> Source:
    return _opener(config, split).open(config, split, classes)


def _relabelled(source: Source, classes: tuple[str, ...]) -> Source:
    """`source` with its labels in the order of `classes`, which are its own."""
    if classes == tuple(source.classes):
        return source
    relabelled: Source = (
        source if isinstance(source, ListedImages) else Part.of(source, range(len(source)))
    ).relabelled(classes)
    return relabelled


def _divided(source: Source, config: DataConfig) -> tuple[Source, Source]:
    """(train, val) of a place that is not divided."""
    return (Part.of(source, ()), source) if config.val_share == 1 else hold_out(source, config.val_share)


def _limited(train: Source, config: DataConfig) -> Source:
    return limit_classes(train, config.limit_per_class) if config.limit_per_class else train


def common_root(train: Source, val: Source) -> Path:
    """The folder or file that holds both."""
    return Path(os.path.commonpath([train.root, val.root]))


def _opener(config: DataConfig, split: Split) -> Opener:
    if not config.root:
        rule = "must be the folder that holds train/ and val/, or the word demo"
        raise DataError(f"data.root = '': {rule}; give --data.root")
    if config.label_separator and not config.labels:
        rule = "several labels an image are read from a table; add --data.labels FILE.csv"
        raise DataError(f"data.label_separator = {config.label_separator!r}: {rule}")
    return next(opener for opener in OPENERS if opener.recognises(config, split))


def _beside(root: Path) -> str:
    """The names that are there in its place, in words."""
    if not root.is_dir():
        return ""
    there = list_folder(root)
    return f" (there is {show_names(sorted(there.folders + there.files + there.hidden))})"
