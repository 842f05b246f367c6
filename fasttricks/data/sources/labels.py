"""Labels that a data set has as numbers or names, its class names, and the checks of images that have them. No torch, no DALI."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fasttricks.config import show_name, unknown
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import show_names
from fasttricks.data.sources.listed import ListedImages
from fasttricks.data.sources.quarantine import read_quarantine
from fasttricks.system.reading import Reader, is_there, parse_json
from fasttricks.system.schema import fields

Label = int | str
"""The number of a class, or its name."""
LONGEST_NAME = 1000
_NUMBER = re.compile(r"\d{1,18}")
_NAMES = Reader(
    DataError, "must hold the name of a class in each line, in the order of their numbers", "mend it", 1 << 24
)
_JSON = fields({})
Images = TypeVar("Images", bound=ListedImages)


class Numbered(NamedTuple):
    """Labels as numbers of `classes`."""

    classes: tuple[str, ...]
    labels: list[int]
    numbered: bool
    """Whether the data gives the classes their numbers, and so their order."""


def number_labels(found: Sequence[Label], names: Sequence[str] | None, place_of: Callable[[int], str]) -> Numbered:
    """The classes of these labels, and the number of each. names: those of the numbers from 0 on; None: numbers name themselves.

    place_of(i): where label i stands, for messages. Raises DataError for numbers beside names, and one that is not of `names`.
    """
    number, word = (next((at for at, one in enumerate(found) if type(one) is kind), -1) for kind in (int, str))
    if min(number, word) >= 0:
        said = f"label = {found[number]} here, and {found[word]!r:.100} in {place_of(word)}"
        raise DataError(f"{place_of(number)}: {said}; labels must all be numbers or all be names")
    if names is None:
        classes = tuple(map(str, sorted(set(found))))
        number_of = {name: at for at, name in enumerate(classes)}
        return Numbered(classes, [number_of[str(label)] for label in found], number >= 0)
    number_of = {name: at for at, name in enumerate(names)}
    labels = []
    for at, label in enumerate(found):
        number = label if isinstance(label, int) else number_of.get(label, -1)
        if not 0 <= number < len(names):
            rule = f"must be one of the {len(names)} classes, 0 to {len(names) - 1}"
            rule = rule if isinstance(label, int) else unknown(label, names)
            raise DataError(f"{place_of(at)}: label = {label!r:.100}: {rule}; mend the label or the class names")
        labels.append(number)
    return Numbered(tuple(names), labels, True)


def label_of_text(content: bytes) -> Label:
    """The label in a text: a whole number, 0 or more, or else a name. Raises ValueError for one that is neither."""
    text = content.decode().strip()
    return int(text) if _NUMBER.fullmatch(text) and text.isascii() else class_name(text)


def label_of_json(content: bytes) -> Label | None:
    """Field label, or else cls, of a table in JSON; None where it has neither. Raises ValueError for another kind of label."""
    table = parse_json(content, _JSON)
    label: Any = table.get("label", table.get("cls"))
    if type(label) is int and 0 <= label < 10**18:
        return label
    if label is None or isinstance(label, str):
        return None if label is None else class_name(label)
    raise ValueError(f"label = {label!r:.100}: must be a whole number, 0 or more, or a name")


def class_name(text: str) -> str:
    """`text`, the name of a class. Raises ValueError where it cannot be one."""
    if not text or len(text) > LONGEST_NAME or "\0" in text or text != text.strip() or re.fullmatch(r"-\d+", text):
        rule = f"must be a whole number, 0 or more, or a name of 1 to {LONGEST_NAME} characters without space around it"
        raise ValueError(f"label = {text!r:.100}: {rule}")
    return text


def read_names(path: Path) -> tuple[str, ...] | None:
    """The class names in the file, one a line; None where it is not there. Raises DataError for one twice or empty."""
    if not is_there(path):
        return None
    try:
        lines = _NAMES.read(path).decode("utf-8-sig").rstrip().split("\n")
        names = tuple(class_name(line.strip()) for line in lines)
    except UnicodeDecodeError as error:
        raise _NAMES.refusal(path, f"not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise error if isinstance(error, DataError) else _NAMES.refusal(path, error) from error
    require_unique(names, path)
    return names


def require_unique(names: Sequence[str], place: Path | str) -> None:
    """Raise DataError where a class name stands twice."""
    known = set()
    for name in names:
        if name in known:
            raise DataError(f"{place}: the class name {show_name(name)} stands twice in it; names must differ")
        known.add(name)


def finished(images: Images, root: Path, split: str, classes: tuple[str, ...] | None) -> Images:
    """`images` of a split of `root` with its quarantine lists, labelled by `classes` where given.

    Raises DataError for an image of a class that `classes` lacks, and a class all of whose images are bad. A class of the
    training split without images is named in a warning.
    """
    known = images.classes if classes is None else classes
    number = {name: label for label, name in enumerate(known)}
    new = [number.get(name, -1) for name in images.classes]
    stranger = next((at for at, label in enumerate(images.labels) if new[label] < 0), None)
    if stranger is not None:
        wrong = f"class {show_name(images.classes[images.labels[stranger]])} has no counterpart in train"
        rule = f"{wrong}, which has {len(known)} classes; add it there or remove it here"
        raise DataError(f"{root}: {split}: {images.name(stranger)}: {rule}")
    listed = read_quarantine(root / split)
    bad = {at: listed[name] for at, name in enumerate(images.files) if name in listed} if listed else {}
    images = replace(
        images, classes=known, labels=tuple(new[label] for label in images.labels), bad={**images.bad, **bad}
    )
    some = set(images.labels)
    good = some if not images.bad else {label for at, label in enumerate(images.labels) if at not in images.bad}
    for at, why in images.bad.items():
        if images.labels[at] not in good:
            wrong = f"no image of class {show_name(known[images.labels[at]])} can be used ({images.name(at)}: {why})"
            raise DataError(f"{root}: {split}: {wrong}; add images or remove the class")
    empty = [name for label, name in enumerate(known) if label not in some]
    if empty and split == "train":
        without = f"{len(empty)} of {len(known)} classes have no training image ({show_names(empty)})"
        warnings.warn(f"{show_name(root)}: {without}; the network has outputs for them too", stacklevel=2)
    return images
