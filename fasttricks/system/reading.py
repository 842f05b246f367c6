"""Files that others may have written, read under bounds: regular files alone, none longer than it may be, none waited for.

A link is followed, by the rights of the user who put it there; the content of a file never leads to another file. No torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttricks.config import UserError
from fasttricks.system.refusals import way_out
from fasttricks.system.schema import Kind

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_NO_BRACKETS = bytes({*range(256)} - {*b"[]{}"})
_DEEPEST, _MOST = 32, 10_000
_DIGITS = 20  # of 2^64; CPython takes a time that grows with the square
_OF_THE_FILE = (errno.EISDIR, errno.EINVAL, errno.EFBIG, errno.ENOENT, errno.ENOTDIR)
"""Errors about the kind of the file; all others mean that it cannot be reached."""
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@contextmanager
def regular_file(path: Path | str) -> Iterator[tuple[int, int]]:
    """(descriptor, bytes) of a regular file, open for reading. Raises OSError, also for anything else, which is not opened."""
    _require_regular(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)  # the file that is there now
        _require_regular(status)
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _require_regular(status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'a socket')}, not a file")


def read_range(descriptor: int, start: int, length: int) -> bytes:
    """`length` bytes of an open file from `start` on, or as many as it has. From any thread. Raises OSError."""
    content = os.pread(descriptor, length, start)
    while len(content) < length and (more := os.pread(descriptor, length - len(content), start + len(content))):
        content += more
    return content


def parse_json(content: bytes, kind: Kind) -> Any:
    """The JSON value of `content`, of that kind. Raises ValueError with the fault, in words.

    UTF-8, nested at most 32 deep, at most 10,000 lists and tables, whole numbers of at most 20 digits. Its memory is a small
    multiple of its text.
    """
    brackets = _STRING.sub(b"", content).translate(None, _NO_BRACKETS)
    depth = deepest = 0
    for bracket in brackets[: 2 * _MOST + 1]:
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > _DEEPEST or len(brackets) > 2 * _MOST:
        raise ValueError(f"nested deeper than {_DEEPEST}, or of more than {_MOST:,} lists and tables")
    try:
        value = json.loads(content.decode(), parse_int=_parse_int)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    kind(value, "")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits, more than {_DIGITS}")
    return int(digits)


@dataclass(frozen=True)
class Reader:
    """How files of one kind are read, and how one that is not as it should be is refused."""

    error: type[UserError]
    rule: str
    """The rule of the file."""
    way_out: str
    max_bytes: int = 1 << 20

    def refusal(self, path: Path | str, wrong: object) -> UserError:
        """The error for the file, with its fault in words."""
        return self.error(f"{path}: {self.rule} ({wrong}); {self.way_out}")

    def read(self, path: Path, max_bytes: int | None = None) -> bytes:
        """All bytes of the file. Raises self.error where it is no regular file, longer than max_bytes, or unreadable."""
        limit = self.max_bytes if max_bytes is None else max_bytes
        try:
            with regular_file(path) as (descriptor, size):
                if size > limit:
                    raise OSError(errno.EFBIG, f"{size:,} bytes long, more than {limit:,}")
                return read_range(descriptor, 0, size)
        except OSError as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: Path, error: OSError) -> UserError:
        if error.errno in _OF_THE_FILE:
            return self.refusal(path, error.strerror or error)
        return self.error(f"{path}: {error.strerror or error}; {way_out(error)}")

    def json(self, path: Path, kind: Kind) -> Any:
        """The value of the file, of that kind. Raises self.error."""
        content = self.read(path)
        try:
            return parse_json(content, kind)
        except ValueError as error:
            raise self.refusal(path, error) from error

    def each_line(self, path: Path) -> Iterator[bytes]:
        """The lines of the file, however many, none longer than max_bytes; the last one also where it is torn.

        Holds one at a time. Raises self.error as read().
        """
        try:
            with regular_file(path) as (descriptor, _), open(descriptor, "rb", closefd=False) as file:
                while line := file.readline(self.max_bytes + 1):
                    if len(line) > self.max_bytes:
                        raise OSError(errno.EFBIG, f"a line of more than {self.max_bytes:,} bytes")
                    yield line
        except OSError as error:
            raise self._unreadable(path, error) from error

    def lines(self, path: Path, kind: Kind) -> Iterator[Any]:
        """The value of each line, of that kind, without empty lines. Raises self.error with the line's number."""
        for number, line in enumerate(self.read(path).split(b"\n"), 1):
            if line.strip():
                try:
                    yield parse_json(line, kind)
                except ValueError as error:
                    raise self.refusal(path, f"line {number}: {error}") from error


def is_there(path: Path | str) -> bool:
    """Whether anything has that name, a link that points nowhere too: it is to be read, or refused, and not passed over.

    Raises OSError where that cannot be told: a folder above it may not be entered, or its disk does not answer.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
