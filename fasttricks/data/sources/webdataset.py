"""Images in webdataset's tars, read in place: ROOT/train-*.tar or ROOT/train/*.tar, and val likewise (splits.py).

The members of a tar that share their name up to the first dot are a sample: an image, and a label as .cls or as "label" or "cls"
in .json. Labels are whole numbers or names. ROOT/classes.txt, where it is there, names the numbers, a class in each line.

The index (where each image lies, its name and label) is made once, from the headers of the tars, their labels and the first
bytes of their images, and kept in the cache. No torch, no DALI.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasttricks.config import DataConfig, show_name
from fasttricks.data.sources.cache import Columns, kept_columns, name_of
from fasttricks.data.sources.checked import in_threads
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import named_image, show_names
from fasttricks.data.sources.headers import HEADER_BYTES, why_no_image
from fasttricks.data.sources.labels import Label, finished, label_of_json, label_of_text, number_labels, read_names
from fasttricks.data.sources.listed import ListedImages, Where
from fasttricks.data.sources.splits import choose_val, find_shards
from fasttricks.data.sources.tar import Member, opened_tar
from fasttricks.system.reading import is_there, parse_json, read_range
from fasttricks.system.schema import fields, listed, table, text

ENDING, NAMES = ".tar", "classes.txt"
_FORMAT = 1
_COLUMNS = {
    "names": np.uint8,
    "notes": np.uint8,
    "shard": np.uint32,
    "start": np.uint64,
    "length": np.uint64,
    "label": np.uint32,
}
_NOTES = fields({"bad": table(text(1000)), "classes": listed(text()), "passed": listed(text(10_000))})
_LABEL_BYTES = {"cls": 4096, "json": 1 << 20}
"""The endings of labels, of which the first counts where a sample has both, and how long one may be."""


@dataclass(frozen=True)
class TarImages(ListedImages):
    """The images of one split in tars, sorted by class and then by name: CLASS/MEMBER, as in a folder."""

    shards: tuple[str, ...]
    """Their paths."""
    index: dict[str, NDArray[Any]]
    """Columns shard, start and length, an entry an image."""

    def locate(self, index: int) -> Where:
        """The bytes of the tar that are image `index`."""
        shard, start, length = (int(self.index[column][index]) for column in ("shard", "start", "length"))
        return Where(self.shards[shard], start, length)


def is_webdataset(config: DataConfig, split: str) -> bool:
    """Whether data.root has tars of that split, or of another and no folder ROOT/SPLIT. Raises DataError as find_shards."""
    found = find_shards(Path(config.root), ENDING)
    return bool(found[split]) if split in found else any(found.values())


def webdataset_holds(config: DataConfig, split: str) -> bool:
    """Whether data.root has tars of that split. Raises DataError as find_shards."""
    return bool(_shards(config).get(split))


def open_webdataset(config: DataConfig, split: str, classes: tuple[str, ...] | None) -> TarImages:
    """The images of that split. Its index is made first where the cache lacks it.

    Raises DataError as opened_tar, and for a sample with two images, no image, two labels, no label or one that is none, a name
    that two samples have, numbers beside names, a label that is not of classes.txt, a damaged classes.txt, a class that
    `classes` lacks, and where the cache cannot be written.
    Cost: the index: a read of 512 bytes a member, and of each label; then a read of the index, 60 bytes an image.
    """
    root, shards = Path(config.root), _shards(config)[split]
    names = root / NAMES
    made_of = (*shards, NAMES) if is_there(names) else shards
    try:
        name = name_of("webdataset", root, made_of, _FORMAT)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; bring it back") from error
    columns = kept_columns(name, root, _COLUMNS, lambda: _make_index(root, split, shards))
    notes = parse_json(columns.pop("notes").tobytes(), _NOTES)
    if notes["passed"]:
        warnings.warn(f"{show_name(root)}: {split}: not read: {show_names(notes['passed'])}", stacklevel=2)
    files = tuple(os.fsdecode(columns.pop("names").tobytes()).split("\0"))
    labels, bad = tuple(columns.pop("label").tolist()), {int(at): why for at, why in notes["bad"].items()}
    numbered = bool(notes["numbered"])
    paths = tuple(str(root / shard) for shard in shards)
    images = TarImages(root / split, tuple(notes["classes"]), files, labels, paths, columns, bad=bad, numbered=numbered)
    return finished(images, root, split, classes)


def _shards(config: DataConfig) -> dict[str, tuple[str, ...]]:
    root = Path(config.root)
    return choose_val(root, {split: shards for split, shards in find_shards(root, ENDING).items() if shards})


# ------------------------------------------------------------------------------------------------------------ the index
class _Sample(NamedTuple):
    key: str
    image: Member
    why_bad: str | None
    label: Label


class _Shard(NamedTuple):
    samples: list[_Sample]
    others: Counter[str]
    """Endings of members that are neither an image nor a label, and how many."""


def _make_index(root: Path, split: str, shards: tuple[str, ...]) -> Columns:
    read = in_threads(f"index {split}", [root / shard for shard in shards], _read_shard)
    found = [(number, sample) for number, shard in enumerate(read) for sample in shard.samples]
    if not found:
        raise DataError(f"{root}: {split}: no sample in {show_names(shards)}; give tars with images, or remove them")

    def place_of(at: int) -> str:
        return f"{root / shards[found[at][0]]}: {found[at][1].key}"

    known: dict[str, int] = {}
    for at, (_, sample) in enumerate(found):
        if (first := known.setdefault(sample.key, at)) != at:
            raise DataError(
                f"{place_of(at)}: a sample of that name is in {shards[found[first][0]]} too; give each its own"
            )
    classes, labels, numbered = number_labels([sample.label for _, sample in found], read_names(root / NAMES), place_of)
    order = sorted(range(len(found)), key=lambda at: (classes[labels[at]], found[at][1].image.name))
    names = [f"{classes[labels[at]]}/{found[at][1].image.name}" for at in order]
    if any("\0" in name for name in names):
        raise DataError(f"{root}: {split}: a name with a NUL byte in it; write the tar without it")
    others = sum((shard.others for shard in read), Counter[str]())
    notes = {
        "classes": classes,
        "numbered": numbered,
        "bad": {str(number): why for number, at in enumerate(order) if (why := found[at][1].why_bad)},
        "passed": [f"{count:,} {ending}" for ending, count in sorted(others.items())],
    }
    return {
        "names": np.frombuffer(os.fsencode("\0".join(names)), np.uint8),
        "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8),
        "shard": np.array([found[at][0] for at in order]),
        "start": np.array([found[at][1].image.start for at in order]),
        "length": np.array([found[at][1].image.length for at in order]),
        "label": np.array([labels[at] for at in order]),
    }


def _read_shard(path: Path) -> _Shard:
    samples: dict[str, dict[str, Member]] = {}
    others: Counter[str] = Counter()
    with opened_tar(path) as (descriptor, members):
        for member in members:
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            ending = ending.lower()
            if not stem or not ending:
                others["without a name before and after a dot"] += 1
                continue
            sample = samples.setdefault(folder + slash + stem, {})
            if ending in sample:
                raise DataError(f"{path}: {member.name}: {sample[ending].name} is there too; write each name once")
            sample[ending] = member
            if not _is_image(ending) and ending not in _LABEL_BYTES:
                others[f".{ending}"] += 1
        return _Shard([_read_sample(path, descriptor, key, sample) for key, sample in samples.items()], others)


def _read_sample(path: Path, descriptor: int, key: str, members: dict[str, Member]) -> _Sample:
    images = [member for ending, member in members.items() if _is_image(ending)]
    if len(images) > 1:
        both = f"two images, {images[0].name} and {images[1].name}"
        raise DataError(f"{path}: {key}: {both}; name another picture of the sample KEY.OTHER.png")
    labels = (_read_label(path, descriptor, ending, members[ending]) for ending in _LABEL_BYTES if ending in members)
    label = next((label for label in labels if label is not None), None)  # .json is not read where .cls says it
    if not images or label is None:
        lacks = "no image" if not images else "no label (.cls, or label or cls in .json)"
        raise DataError(f"{path}: {key}: a sample with {lacks}; write the tar with both, or without it")
    header = read_range(descriptor, images[0].start, min(HEADER_BYTES, images[0].length))
    return _Sample(key, images[0], why_no_image(header), label)


def _read_label(path: Path, descriptor: int, ending: str, member: Member) -> Label | None:
    try:
        if member.length > _LABEL_BYTES[ending]:
            raise ValueError(f"{member.length:,} bytes long, more than {_LABEL_BYTES[ending]:,}")
        content = read_range(descriptor, member.start, member.length)
        return label_of_text(content) if ending == "cls" else label_of_json(content)
    except ValueError as error:
        raise DataError(f"{path}: {member.name}: {error}; write the tar with another label") from error


def _is_image(ending: str) -> bool:
    return "." not in ending and named_image(ending)
