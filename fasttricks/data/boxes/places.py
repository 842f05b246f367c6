"""Pascal VOC's layout on disk, and the faults of a data set, found before training begins. No torch, no DALI.

ROOT (VOCdevkit) has VOC2007, VOC2012 or both, each with ImageSets/Main/LIST.txt, a name in each line; JPEGImages/NAME.jpg, or
another ending of an image; and Annotations/NAME.xml.
Training takes trainval.txt of each year that has it, validation test.txt of 2007: the test set of 2012 is not public. Without
that file training takes train.txt of each year, and validation val.txt.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fasttricks.config import ConfigError, DataConfig, require, show_name
from fasttricks.data.boxes.annotation import Annotation, BadAnnotation, read_annotation
from fasttricks.data.boxes.checks import Kept, usable
from fasttricks.data.boxes.lists import LAYOUT, Listed, find_images, read_list
from fasttricks.data.boxes.source import Boxes, BoxSource
from fasttricks.data.sources.checked import in_threads
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import show_names
from fasttricks.data.sources.walk import why_none
from fasttricks.system.reading import is_there

BoxSplit = Literal["train", "val", "test"]
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The classes of Pascal VOC, in the order of its development kit."""
YEARS = ("VOC2007", "VOC2012")
_UNUSED = ("labels", "class_order", "nested", "val_share", "limit_per_class", "balance")
"""Fields of DataConfig that no place of boxes has a use for."""


def open_boxes(config: DataConfig) -> tuple[BoxSource, BoxSource]:
    """(train, val) of data.root; warns where an image is in both. Raises DataError as open_box_split."""
    train = open_box_split(config, "train")
    val = open_box_split(config, "val", classes=train.classes)
    both = sorted({*train.images} & {*val.images})
    if both:
        seen = f"training has {len(both)} of the {len(val)} images of validation too ({show_names(both)})"
        warnings.warn(f"{show_name(train.root)}: {seen}; its scores say nothing of new images", stacklevel=2)
    return train, val


def require_boxes(config: DataConfig, *splits: BoxSplit) -> None:
    """Raise DataError where the splits of data.root cannot be opened, as far as a look at the place tells: milliseconds."""
    root = _checked(config.root)
    for split in splits:
        _lists(root, split)


def open_box_split(config: DataConfig, split: BoxSplit, *, classes: Sequence[str] | None = None) -> BoxSource:
    """The images and boxes of one split of data.root, in the order of its lists.

    classes: those that it must have, in order, as of a trained network. None: Pascal VOC's 20 where the training annotations
    have no others, else the names in them, sorted; so validation reads those of training too.
    An image is bad that is not there, or without an annotation, or with one that breaks a rule (annotation.py), has an object
    of no such class, or a box that reaches out of the image by more than a pixel. A box without an area is left out, one that
    reaches out by a pixel ends at the edge, and a name that is listed again counts once: each is named and counted by the
    loader. That the annotation has the image's size is checked as the image is read.

    Raises DataError for a place of another layout, a list that breaks its rule or has no good image, and a training split
    without any object. Raises ConfigError for a field that would have no effect.
    Cost: a listing of two folders a year, the first 12 bytes of each image, and all annotations, in threads.
    """
    for name in _UNUSED:
        value, default = getattr(config, name), getattr(DataConfig(), name)
        require(
            value == default, f"data.{name}", value, f"has no effect on boxes; leave it at {default!r}", ConfigError
        )
    root = _checked(config.root)
    scan = _scan(root, _lists(root, split))
    if classes is None:
        classes = _classes(scan if split == "train" else _scan(root, _lists(root, "train")))
    return _source(root, scan, tuple(classes))


def _checked(given: str) -> Path:
    if not given or given == "demo":
        raise DataError(f"data.root = {given!r}: must be a folder of images and boxes; give --data.root; {LAYOUT}")
    root = Path(given)
    if reason := why_none(root):
        raise DataError(f"{root}: {reason}; {LAYOUT}")
    if any(is_there(root / year) for year in YEARS):
        return root
    found = show_names(sorted(os.listdir(root))) or "nothing"
    way_out = LAYOUT
    if is_there(root / "VOCdevkit"):
        way_out = f"give --data.root {root / 'VOCdevkit'}"
    elif is_there(root / "ImageSets"):
        way_out = f"give the folder that holds it, --data.root {root.absolute().parent}"
        way_out += "" if root.absolute().name in YEARS else f", and call it {YEARS[0]} there"
    raise DataError(f"{root}: holds no {' or '.join(YEARS)} (there is {found}); {way_out}")


def _lists(root: Path, split: BoxSplit) -> tuple[str, ...]:
    """The lists of the split, relative to root."""
    there = {f"{year}/ImageSets/Main/{name}.txt" for year in YEARS for name in ("train", "val", "trainval", "test")}
    there = {one for one in there if is_there(root / one)}
    held_out = f"{YEARS[0]}/ImageSets/Main/test.txt"
    if held_out in there and split != "train":
        return (held_out,)
    name = "trainval" if held_out in there else split
    found = tuple(one for year in YEARS if (one := f"{year}/ImageSets/Main/{name}.txt") in there)
    if not found:
        has = show_names(sorted(there)) or "none"
        raise DataError(f"{root}: no list {name}.txt for the split {split} (there is {has}); {LAYOUT}")
    return found


@dataclass
class _Scan:
    """The images of a split with their annotations."""

    lists: tuple[str, ...]
    images: list[Listed] = field(default_factory=list)
    annotations: list[Annotation | None] = field(default_factory=list)
    """None where the image is bad."""
    bad: dict[int, str] = field(default_factory=dict)
    strays: dict[str, str] = field(default_factory=dict)


def _scan(root: Path, lists: tuple[str, ...]) -> _Scan:
    scan = _Scan(lists)
    for path in lists:
        scan.images += find_images(root, path.partition("/")[0], read_list(root, path, scan.strays))
    scan.bad = {at: one.bad for at, one in enumerate(scan.images) if one.bad}
    good = [at for at in range(len(scan.images)) if at not in scan.bad]
    read = in_threads("read annotations", good, lambda at: _read(root / scan.images[at].annotation))
    scan.annotations = [None] * len(scan.images)
    for at, found in zip(good, read, strict=True):
        if isinstance(found, str):
            scan.bad[at] = f"annotation {scan.images[at].annotation}: {found}"
        else:
            scan.annotations[at] = found
    return scan


def _read(path: Path) -> Annotation | str:
    """The annotation, or why it is bad."""
    try:
        return read_annotation(path)
    except BadAnnotation as error:
        return str(error)


def _classes(scan: _Scan) -> tuple[str, ...]:
    """The classes of the training annotations."""
    names = {one.name for annotation in scan.annotations if annotation for one in annotation.objects}
    if not names:
        where, why = " and ".join(scan.lists), ""
        for at, reason in scan.bad.items():
            why = f"; {show_name(scan.images[at].name)}: {reason}"
        count = f"{len(scan.images)} training images"
        raise DataError(
            f"{where}: no object on any of the {count}, so there is no class{why or '; mend the annotations'}"
        )
    return VOC_CLASSES if names <= {*VOC_CLASSES} else tuple(sorted(names))


def _source(root: Path, scan: _Scan, classes: tuple[str, ...]) -> BoxSource:
    numbers = {name: number for number, name in enumerate(classes)}
    bad = dict(scan.bad)
    left_out: dict[str, str] = {}
    clamped: dict[str, str] = {}
    sizes, ends = np.zeros((len(scan.images), 2), np.int64), []
    every = Kept([], [], [], {}, {})
    for at, annotation in enumerate(scan.annotations):
        if annotation is not None:
            kept = usable(annotation, numbers)
            if isinstance(kept, str):
                bad[at] = f"annotation {scan.images[at].annotation}: {kept}"
            else:
                sizes[at] = annotation.height, annotation.width
                every.xyxy.extend(kept.xyxy)
                every.labels.extend(kept.labels)
                every.difficult.extend(kept.difficult)
                for named, found in ((left_out, kept.left_out), (clamped, kept.clamped)):
                    named.update({f"{scan.images[at].annotation} object {k}": why for k, why in found.items()})
        ends.append(len(every.labels))
    source = BoxSource(
        root=root,
        lists=scan.lists,
        classes=classes,
        images=tuple(one.name for one in scan.images),
        sizes=sizes,
        ends=np.array(ends, np.int64),
        every=Boxes(
            np.array(every.xyxy, np.float32).reshape(-1, 4),
            np.array(every.labels, np.int64),
            np.array(every.difficult, np.bool_),
        ),
        bad=dict(sorted(bad.items())),
        strays=scan.strays,
        left_out=left_out,
        clamped=clamped,
    )
    if len(source.bad) == len(source):
        name, why = show_name(source.images[0]), source.bad[0]
        raise DataError(f"{source.place}: none of its {len(source)} images is good; {name}: {why}; {LAYOUT}")
    return source
