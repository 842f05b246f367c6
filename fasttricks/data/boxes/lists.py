"""The lists of the images of a split, and the files of each image. No torch, no DALI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fasttricks.config import show_name
from fasttricks.data.annotated.files import by_stem, quarantined, stem
from fasttricks.data.sources.checked import find_bad
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import named_image
from fasttricks.data.sources.walk import list_folder, why_none
from fasttricks.system.reading import Reader

LAYOUT = (
    "the layout is ROOT/VOC2007/ImageSets/Main/trainval.txt and test.txt, or train.txt and val.txt, with "
    "ROOT/VOC2007/JPEGImages/X.jpg and ROOT/VOC2007/Annotations/X.xml for each name X in them; the same in VOC2012"
)
_LISTS = Reader(DataError, "must hold the name of an image in each line, without folder and ending", "mend it", 1 << 26)


class Listed(NamedTuple):
    """An image of a list."""

    name: str
    """Path relative to root; where it is not there the path that it should have."""
    annotation: str
    """As name."""
    bad: str
    """Why it is bad before its annotation is read; empty: it is not."""

    @property
    def file(self) -> str:
        """The name without folders."""
        return self.name.rpartition("/")[2]


def read_list(root: Path, path: str, strays: dict[str, str]) -> list[str]:
    """The names in ROOT/PATH, each once; a line that names one again is added to `strays`, with why. Raises DataError."""
    try:
        lines = _LISTS.read(root / path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _LISTS.refusal(root / path, f"not UTF-8 at byte {error.start}") from error
    found: dict[str, int] = {}
    for number, name in enumerate((line.strip() for line in lines), 1):
        if "/" in name or "\0" in name or name in (".", ".."):
            raise _LISTS.refusal(root / path, f"line {number} is {show_name(name)}")
        if name in found:
            strays[f"{path} line {number}"] = f"{show_name(name)} is in line {found[name]} too; it counts once"
        elif name:
            found[name] = number
    if not found:
        raise DataError(f"{root / path}: names no image; {LAYOUT}")
    return list(found)


def find_images(root: Path, year: str, names: Sequence[str]) -> list[Listed]:
    """The image of each of `names` in ROOT/YEAR."""
    folder, notes = f"{year}/JPEGImages", f"{year}/Annotations"
    for one in (folder, notes):
        if reason := why_none(root / one):
            raise DataError(f"{root / one}: {reason}; {LAYOUT}")
    by_name = by_stem(list_folder(root / folder).files)
    annotated = {*list_folder(root / notes).files}
    spelled = {one.casefold(): files[0] for one, files in by_name.items()}
    images = [_find(name, folder, notes, by_name, annotated, spelled) for name in names]
    files = [one.file for one in images if not one.bad]
    no_image = find_bad(root / folder, files, len(files))
    kept = quarantined(root, folder)
    reasons = {**kept, **no_image}
    return [one if one.bad else one._replace(bad=reasons.get(one.file, "")) for one in images]


def _find(
    name: str,
    folder: str,
    notes: str,
    by_name: Mapping[str, Sequence[str]],
    annotated: set[str],
    spelled: Mapping[str, str],
) -> Listed:
    files = [file for file in by_name.get(name, ()) if named_image(file)] or [*by_name.get(name, ())]
    file, annotation, bad = (files or [f"{name}.jpg"])[0], f"{name}.xml", ""
    if not files:
        bad = "no such image" if annotation in annotated else "no such image, and no annotation"
        if name in by_name.get(stem(name), ()):
            bad += "; a list must name it without its ending"
        elif other := spelled.get(name.casefold()):
            bad += f"; {show_name(other)} there differs in upper and lower case"
    elif len(files) > 1:
        bad = f"{' and '.join(map(show_name, files))} would share an annotation; give each a name of its own"
    elif annotation not in annotated:
        bad = f"no annotation {notes}/{show_name(annotation)}"
    return Listed(f"{folder}/{file}", f"{notes}/{annotation}", bad)
