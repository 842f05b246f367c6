"""The layouts of images and masks on disk, and the faults of one, found before training begins. No torch, no DALI.

ADE20K: ROOT/images/{training,validation,testing}/X.jpg, ROOT/annotations/{the same}/X.png, ROOT/objectInfo150.txt. Value 0 of a
mask is ignored; 1 to K are the classes, in the order of that file.
Plain: ROOT/{train,val,test}/images/X.jpg, ROOT/{the same}/masks/X.png, ROOT/classes.txt. Value 255 is ignored; 0 to K - 1 are the
classes, in the order of that file.
An image and its mask have the same name but for the ending. A link counts as its target.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from fasttricks.config import ConfigError, DataConfig, require, show_name
from fasttricks.data.annotated.files import by_stem, quarantined, stem
from fasttricks.data.masks.classes import OBJECTS, first_difference, read_classes, read_objects
from fasttricks.data.masks.source import MaskSource
from fasttricks.data.sources.checked import find_bad, in_threads
from fasttricks.data.sources.errors import DataError, why_unreadable
from fasttricks.data.sources.folder import named_image, show_names
from fasttricks.data.sources.walk import list_folder, why_none
from fasttricks.system.reading import is_there, read_range, regular_file

MaskSplit = Literal["train", "val", "test"]
SPLITS: tuple[MaskSplit, ...] = ("train", "val", "test")
LAYOUT = (
    f"the layout is ROOT/images/training/X.jpg, ROOT/annotations/training/X.png and ROOT/{OBJECTS} (ADE20K), "
    "or ROOT/train/images/X.jpg, ROOT/train/masks/X.png and ROOT/classes.txt, and the same for validation"
)
_ADE_SPLITS = {"train": "training", "val": "validation", "test": "testing"}
_UNUSED = ("labels", "class_order", "nested", "val_share", "limit_per_class", "balance")
"""Fields of DataConfig that no place of masks has a use for."""
_PNG = b"\x89PNG\r\n\x1a\n"
_HEADER_BYTES, _COLOR_AT = 33, 25  # to the end of the first chunk, which every PNG begins with
_COLORS = {2: "RGB", 4: "grey with alpha", 6: "RGB with alpha"}


class Place(NamedTuple):
    """Where one split lies."""

    images: str
    """Folder, relative to ROOT."""
    masks: str
    first: int
    """As MaskSource.first."""


def open_masks(config: DataConfig) -> tuple[MaskSource, MaskSource]:
    """(train, val) of data.root. Raises DataError as open_mask_split."""
    return open_mask_split(config, "train"), open_mask_split(config, "val")


def require_masks(config: DataConfig, *splits: MaskSplit) -> None:
    """Raise DataError where the splits of data.root cannot be opened, as far as a look at the place tells: milliseconds."""
    for split in splits:
        _find(config.root, split)


def open_mask_split(config: DataConfig, split: MaskSplit, *, classes: Sequence[str] | None = None) -> MaskSource:
    """The images and masks of one split of data.root, sorted by name.

    classes: the names that it must have, in order, as those of a trained network; None: any.
    An image is bad without a mask, with two, or with a mask that is no PNG or has colours; a mask without an image is a stray.
    Neither is left out in silence: the loader names and counts them. The values of a mask are checked as it is read.

    Raises DataError for a place of another layout, a split without images or without a good one, a file of classes
    that is not there or breaks its rule, and other classes. Raises ConfigError for a field that would have no effect.
    Cost: a listing of two folders, and the first 33 bytes of each file, in threads.
    """
    for name in _UNUSED:
        value, default = getattr(config, name), getattr(DataConfig(), name)
        require(
            value == default, f"data.{name}", value, f"has no effect on masks; leave it at {default!r}", ConfigError
        )
    root, (place, names) = Path(config.root), _find(config.root, split)
    if classes is not None and (difference := first_difference(tuple(classes), names)):
        raise DataError(
            f"{root}: must have the {len(classes)} classes of the network, in order ({difference}); mend it"
        )
    return _scan(root, place, names)


def _find(given: str, split: MaskSplit) -> tuple[Place, tuple[str, ...]]:
    """Where the split lies, and the names of the classes."""
    if not given or given == "demo":
        raise DataError(f"data.root = {given!r}: must be a folder of images and masks; give --data.root; {LAYOUT}")
    root = Path(given)
    if reason := why_none(root):
        raise DataError(f"{root}: {reason}; {LAYOUT}")
    if is_there(root / "annotations") or is_there(root / OBJECTS):
        place = Place(f"images/{_ADE_SPLITS[split]}", f"annotations/{_ADE_SPLITS[split]}", 1)
    elif any(is_there(root / name / "images") for name in SPLITS):
        place = Place(f"{split}/images", f"{split}/masks", 0)
    else:
        inner = root / "ADEChallengeData2016"
        found = show_names(sorted(os.listdir(root))) or "nothing"
        way_out = f"give --data.root {inner}" if is_there(inner) else LAYOUT
        raise DataError(f"{root}: holds no images and masks (there is {found}); {way_out}")
    for folder in (place.images, place.masks):
        if reason := why_none(root / folder):
            raise DataError(f"{root / folder}: {reason}, so there is no split {split}; {LAYOUT}")
    return place, read_objects(root) if place.first else read_classes(root, SPLITS)


def _scan(root: Path, place: Place, classes: tuple[str, ...]) -> MaskSource:
    images, bad_headers, skipped = _list(root / place.images)
    masks, _, more = _list(root / place.masks)
    masks_of = by_stem(masks)
    bad = _unpaired(images, masks_of, place.masks)
    paired = {image: masks_of[stem(image)][0] for image in images if image not in bad}
    headers = in_threads(
        f"check {place.masks}", list(paired.values()), lambda mask: why_no_mask(root / place.masks / mask)
    )
    reasons: dict[str, str] = {
        **quarantined(root, place.images),
        **{image: f"mask {mask}: {why}" for (image, mask), why in zip(paired.items(), headers, strict=True) if why},
        **bad,
        **bad_headers,
    }
    stems = {stem(image) for image in images}
    strays = {f"{place.masks}/{mask}": "mask without an image" for mask in masks if stem(mask) not in stems}
    source = MaskSource(
        root=root,
        folder=place.images,
        classes=classes,
        images=tuple(f"{place.images}/{image}" for image in images),
        masks=tuple(f"{place.masks}/{paired[image]}" if image in paired else "" for image in images),
        first=place.first,
        bad={number: reasons[image] for number, image in enumerate(images) if image in reasons},
        strays=strays,
    )
    _require_some(source, masks)
    if skipped or more:
        names = [*(f"{place.images}/{name}" for name in skipped), *(f"{place.masks}/{name}" for name in more)]
        kinds = "hidden or system files, or files without an image's name and content"
        warnings.warn(f"{show_name(root)}: skipped {len(names)} {kinds} ({show_names(names)})", stacklevel=2)
    return source


def _list(folder: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """(images by name or content, those that are none and why, all other files), each sorted by name."""
    there = list_folder(folder)
    if there.folders:
        rule = "holds a folder, and its files must lie in it directly; move it out"
        raise DataError(f"{folder}: {show_names(there.folders)}: {rule}")
    no_image = find_bad(folder, there.files, len(there.files))
    kept = [name for name in there.files if name not in no_image or named_image(name)]
    others = [name for name in there.files if name in no_image and not named_image(name)]
    return kept, {name: no_image[name] for name in kept if name in no_image}, [*there.hidden, *others]


def _unpaired(images: Sequence[str], masks: Mapping[str, Sequence[str]], folder: str) -> dict[str, str]:
    """The images that have not one mask, and why."""
    bad, own = {}, by_stem(images)
    spelled = {name.casefold(): names[0] for name, names in masks.items()}
    for image in images:
        name = stem(image)
        if len(own[name]) > 1:
            bad[image] = f"{' and '.join(map(show_name, own[name]))} would share a mask; give each a name of its own"
        elif name not in masks:
            other = spelled.get(name.casefold())
            hint = f"; {show_name(other)} there differs in upper and lower case" if other else ""
            bad[image] = f"no mask {folder}/{show_name(name)}.png{hint}"
        elif len(masks[name]) > 1:
            bad[image] = f"has {len(masks[name])} masks, {' and '.join(map(show_name, masks[name]))}; leave one"
    return bad


def _require_some(source: MaskSource, masks: Sequence[str]) -> None:
    """Raise DataError where a split has no image, or none that is good."""
    if not source.images:
        raise DataError(f"{source.place}: no image in it; {LAYOUT}")
    if len(source.bad) < len(source):
        return
    if masks and not any(source.masks):
        image, mask = source.images[0], masks[0]
        rule = "an image and its mask must have the same name but for the ending; rename them"
        raise DataError(f"{source.place}: no image has a mask, as {show_name(image)} beside {show_name(mask)}; {rule}")
    name, why = show_name(source.images[0]), source.bad[0]
    raise DataError(f"{source.place}: none of its {len(source)} images is good; {name}: {why}")


def why_no_mask(path: Path) -> str:
    """The fault of a mask by its first 33 bytes; empty where it is a PNG of one value a pixel."""
    try:
        with regular_file(path) as (descriptor, _):
            header = read_range(descriptor, 0, _HEADER_BYTES)
    except OSError as error:
        return why_unreadable(error)
    return why_no_mask_header(header)


def why_no_mask_header(header: bytes) -> str:
    """The same of those bytes."""
    if not header.startswith(_PNG):
        rule = "must be a PNG, which keeps each value"
        return f"no PNG: first bytes {header[:12]!r}; it {rule}" if header else f"0 bytes long; it {rule}"
    if len(header) < _HEADER_BYTES:
        return "cut off"
    if header[_COLOR_AT] in _COLORS:
        return f"{_COLORS[header[_COLOR_AT]]}: must have one value a pixel, as a palette or grey PNG, the number of its class"
    return ""
