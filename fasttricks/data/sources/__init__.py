"""Images on disk, by number: the Protocol of a source, and the opening of the one that data.root names. No torch, no DALI.

A new kind of source is one new file here and one row of OPENERS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from fasttricks.data.sources.class_order import CODEPOINT, NATURAL, order_classes, read_order
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import check_folder, open_folder
from fasttricks.data.sources.listed import ListedImages, Where
from fasttricks.data.sources.packed import is_packed, open_packed

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("val", "train")
Classes = tuple[str, ...] | None
"""The names that labels follow; None: those that the source has."""


class Source(Protocol):
    """The encoded images of one split, by number from 0 on. Its answers never change; it may be asked from any thread."""

    @property
    def root(self) -> Path:
        """Where they are: the folder or file of the split."""

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
        """The name of image `index`, CLASS/IMAGE; no two share a name."""

    def fingerprint(self) -> str:
        """The same for the same names and labels in the same order, and for no others."""


class Opener(NamedTuple):
    """One kind of source."""

    recognises: Callable[[str, Split], bool]
    """Whether that split of data.root is of this kind."""
    open: Callable[[str, Split, Classes], Source]
    """That split of data.root, labelled by the classes. Raises DataError."""


def _open_demo(root: str, split: Split, classes: Classes) -> Source:
    from fasttricks.data.sources.demo import open_demo  # draws with Pillow, which no other kind needs

    return open_demo(split, classes)


OPENERS = [
    Opener(lambda root, split: root == "demo", _open_demo),
    Opener(
        lambda root, split: is_packed(Path(root, split)),
        lambda root, split, classes: open_packed(Path(root, split), classes=classes),
    ),
    Opener(lambda root, split: True, open_folder),
]
"""The kinds of source. The first that recognises a place opens it; the last takes any, and names its faults."""


def find_dataset(root: str, class_order: str = CODEPOINT) -> tuple[Source, Source]:
    """(train, val) of data.root: a folder, or the word demo for the embedded images, drawn at first use.

    class_order: the order of the classes, and so their labels, as data.class_order; the order of the images is the same in each.
    Raises DataError as open_split and order_classes.
    """
    train = open_split(root, "train")
    classes = order_classes(train.classes, class_order)
    if classes != tuple(train.classes):
        # a listed source needs no second look at every file
        train = (
            train.relabelled(classes) if isinstance(train, ListedImages) else open_split(root, "train", classes=classes)
        )
    return train, open_split(root, "val", classes=train.classes)


def output_classes(root: str, class_order: str, count: int) -> tuple[str, ...]:
    """The names of the `count` outputs of a network that has none itself, in order.

    They are those of the file class_order; else those of val/ or train/ of data.root, whichever has as many, in that order;
    else, without data.root, the numbers from 0 on. Raises DataError where there are others, and as open_split.
    """
    way_out = "give --data.class-order FILE, with a class in each line in the order of the outputs"
    if class_order not in (CODEPOINT, NATURAL):
        names = read_order(class_order)
        if len(names) != count:
            rule = f"names {len(names)} classes, and the network has {count} outputs; {way_out}"
            raise DataError(f"data.class_order = {class_order!r}: {rule}")
        return tuple(names)
    if not root:
        return tuple(map(str, range(count)))
    found = []
    for split in SPLITS:
        if root == "demo" or Path(root, split).is_dir():
            classes = open_split(root, split).classes
            if len(classes) == count:
                return order_classes(classes, class_order)
            found.append(f"{split}/ has {len(classes)} classes")
    rule = f"{', '.join(found) or 'there is no val/'}, and the network has {count} outputs; {way_out}"
    raise DataError(f"data.root = {root!r}: {rule}")


def require_place(root: str, *splits: Split) -> None:
    """Raise DataError where the splits of data.root cannot be opened, as far as a look at the folders tells.

    Reads no list of images: milliseconds. open_split says more.
    """
    _require_name(root)
    for split in splits:
        if OPENERS[-1] is _opener(root, split):
            check_folder(root, split)


def _require_name(root: str) -> None:
    rule = "must be the folder that holds train/ and val/, or the word demo"
    if not root:
        raise DataError(f"data.root = '': {rule}; give --data.root")


def _opener(root: str, split: Split) -> Opener:
    return next(opener for opener in OPENERS if opener.recognises(root, split))


def open_split(root: str, split: Split, *, classes: Classes = None) -> Source:
    """One split of data.root.

    Raises DataError for an empty name, for images that break a rule of their kind (folder.py, packed.py), and where the
    embedded images cannot be written.
    """
    _require_name(root)
    return _opener(root, split).open(root, split, classes)
