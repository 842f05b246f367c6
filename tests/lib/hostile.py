"""What a stranger or a failing disk may put where a file was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]
"""Spoils a file, or what lies in a folder."""
DEEP = b"[" * 100_000 + b"]" * 100_000


class Payload:
    """What runs code where it is unpickled: it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def content(new: bytes) -> Change:
    """The file with other bytes."""
    return lambda path: path.write_bytes(new)


def instead(make: Change) -> Change:
    """Something else where the file was."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def link_to(place: str) -> Change:
    """A link where the file was."""
    return instead(lambda path: path.symlink_to(place))


def sparse(size: int) -> Change:
    """The file so many bytes long, most of them a hole."""
    return lambda path: os.truncate(path, size)


NO_FILES: dict[str, tuple[Change, str]] = {
    "a folder": (instead(Path.mkdir), "Is a directory"),
    "a pipe": (instead(os.mkfifo), "a pipe, not a file"),
    "a device": (link_to("/dev/zero"), "a device, not a file"),
    "a full device": (link_to("/dev/full"), "a device, not a file"),
    "a link to nowhere": (link_to("nowhere"), "No such file"),
    "8 GiB": (sparse(1 << 33), "8,589,934,592 bytes long, more than"),
}
"""Name -> (what is in the place of a file, what is said of it)."""
NO_TABLES: dict[str, tuple[Change, str]] = NO_FILES | {
    "empty": (content(b""), "Expecting value"),
    "text": (content(b"hello"), "Expecting value"),
    "not UTF-8": (content(b'{"config": "\xff"}'), "not UTF-8"),
    "deep": (content(DEEP), "nested deeper than 32"),
    "wide": (content(b"[" + b"[]," * 100_000 + b"1]"), "more than 10,000 lists"),
    "5,000 digits": (content(b'{"config": ' + b"9" * 5000 + b"}"), "a whole number of 5000 digits"),
    "a list": (content(b"[1]"), "must be a table"),
}
"""The same of a file that must be a table in JSON."""
