"""An annotation of Pascal VOC: the objects in an XML file, which others may have written. No torch, no DALI.

Read by expat. A DOCTYPE is refused, and with it every entity but XML's own five, so a file can neither grow as it is read nor
lead to another file or to the network. Size and depth are bounded; memory is a small multiple of the file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from fasttricks.config import show_name
from fasttricks.data.sources.errors import why_unreadable
from fasttricks.system.reading import read_range, regular_file

MOST_BYTES = 1 << 22
"""The most bytes of an annotation: some 12,000 objects."""
_DEEPEST = 16
_LONGEST = 1_000_000
_ROOT = "annotation"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FIELDS: frozenset[tuple[str, ...]] = frozenset(
    [
        *(("size", side) for side in ("width", "height")),
        *(("object", field) for field in ("name", "difficult")),
        *(("object", "bndbox", corner) for corner in _CORNERS),
    ]
)
"""Elements whose text is read, by their path below the root. An object's parts have a name and a box too, deeper."""


class BadAnnotation(ValueError):
    """An annotation that is not to be used. The message is the reason, to follow the file's name."""


class Marked(NamedTuple):
    """An object, as it is written."""

    name: str
    corners: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax, pixels: the first pixel of an image is 1, and the last ones belong to the object."""
    difficult: bool


class Annotation(NamedTuple):
    """The objects of one image."""

    width: int
    """Width and height of the image, pixels, 1 or more."""
    height: int
    objects: tuple[Marked, ...]


def read_annotation(path: Path) -> Annotation:
    """The annotation in that file. Raises BadAnnotation, also where it cannot be read or is over MOST_BYTES."""
    try:
        with regular_file(path) as (descriptor, size):
            if size > MOST_BYTES:
                raise BadAnnotation(f"{size:,} bytes long, over {MOST_BYTES:,}")
            content = read_range(descriptor, 0, size)
    except OSError as error:
        raise BadAnnotation(why_unreadable(error)) from error
    return parse_annotation(content)


def parse_annotation(content: bytes) -> Annotation:
    """The annotation in the bytes of a file. Raises BadAnnotation."""
    if not content.strip():
        raise BadAnnotation("empty" if content else "0 bytes long")
    found = _Elements()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = found.doctype
    parser.StartElementHandler, parser.EndElementHandler = found.start, found.end
    parser.CharacterDataHandler = found.text
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # of an encoding that Python lacks: LookupError
        if isinstance(error, BadAnnotation):
            raise
        raise BadAnnotation(f"no XML, or cut off: {error}") from error
    width, height = (_side(found.size.get(side)) for side in ("width", "height"))
    return Annotation(width, height, tuple(_marked(at, one) for at, one in enumerate(found.objects, 1)))


class _Elements:
    """The text of the elements in _FIELDS, as expat comes to them."""

    def __init__(self) -> None:
        self.size: dict[str, str] = {}
        self.objects: list[dict[str, str]] = []
        self._path: list[str] = []
        self._text: list[str] = []
        self._seen: set[tuple[str, ...]] = set()
        """Elements below the root that may come once: in the file, and in each object."""

    def doctype(self, *_: object) -> None:
        """Refuse it: it may declare entities."""
        raise BadAnnotation("has a DOCTYPE, which may declare entities; leave it out")

    def start(self, name: str, _: dict[str, str]) -> None:
        """An element begins."""
        if not self._path and name != _ROOT:
            raise BadAnnotation(f"root element {show_name(name)}, not {_ROOT}")
        if len(self._path) == _DEEPEST:
            raise BadAnnotation(f"nested deeper than {_DEEPEST} elements")
        if tuple(self._path[1:]) in _FIELDS:
            raise BadAnnotation(f"an element {show_name(name)} in {self._path[-1]}, which has text alone")
        self._path.append(name)
        self._text.clear()
        at = tuple(self._path[1:])
        if at == ("object",):
            self.objects.append({})
            self._seen = {one for one in self._seen if one[0] != "object"}
        elif at in _FIELDS or at in (("size",), ("object", "bndbox")):
            if at in self._seen:
                raise BadAnnotation(f"{self._owner(at)} has two elements {at[-1]}")
            self._seen.add(at)

    def text(self, text: str) -> None:
        """Text of the innermost element."""
        self._text.append(text)

    def end(self, _: str) -> None:
        """An element ends."""
        at = tuple(self._path[1:])
        if at in _FIELDS:
            (self.objects[-1] if at[0] == "object" else self.size)[at[-1]] = "".join(self._text).strip()
        self._path.pop()
        self._text.clear()

    def _owner(self, at: tuple[str, ...]) -> str:
        return f"object {len(self.objects)}" if at[0] == "object" else "it"


def _side(text: str | None) -> int:
    """A side of the image, pixels."""
    value = math.nan if text is None else _number(text)
    if not (1 <= value <= _LONGEST and value == int(value)):
        shown = "none" if text is None else repr(text)
        raise BadAnnotation(f"size: {shown} for a side; must be the image's width and height, 1 to {_LONGEST:,} pixels")
    return int(value)


def _marked(at: int, one: dict[str, str]) -> Marked:
    if not one.get("name"):
        raise BadAnnotation(f"object {at} has no name")
    corners = tuple(_corner(at, corner, one.get(corner)) for corner in _CORNERS)
    difficult = one.get("difficult", "0")  # many tools leave it out
    if difficult not in ("0", "1"):
        raise BadAnnotation(f"object {at}: difficult = {difficult!r}; must be 0 or 1")
    return Marked(one["name"], (corners[0], corners[1], corners[2], corners[3]), difficult == "1")


def _corner(at: int, name: str, text: str | None) -> float:
    if text is None:
        raise BadAnnotation(f"object {at} has no {name}")
    value = _number(text)
    if math.isnan(value):
        raise BadAnnotation(f"object {at}: {name} = {text!r}; must be a number of pixels")
    return value


def _number(text: str) -> float:
    """Its value; NaN for anything else than a finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
