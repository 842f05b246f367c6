"""Standard output and error that may be lost: a closed terminal, `| head`, a full disk behind `>`, `>&-`. No torch.

No writer to them (print, rich, a warning, the last flush) fails for that, nor for a character that their encoding lacks, which
is escaped. A command whose work is kept elsewhere continues. A command whose result is its output ends with the reason.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fasttricks.config import UserError

_NAMES = {1: "standard output", 2: "standard error"}
_lost: dict[int, str] = {}
_kept_in: dict[int, Path] = {}


class LostOutputError(UserError):
    """A result that cannot be said."""

    def __init__(self, number: int, error: OSError) -> None:
        self.quietly = error.errno == errno.EPIPE
        """The reader has read enough, as head does: no reason for a message."""
        rule = "must be a place to write to, which holds the result"
        super().__init__(f"{_NAMES[number]}: {rule}; give another ({error.strerror})")


def lost_output() -> str:
    """Why standard output is lost, empty where it is not."""
    return _lost.get(1, "")


def keep_lost_output(file: Path, *, stdout: bool) -> None:
    """Let `file` replace standard error, and standard output where asked, once it is lost. The file is made then."""
    for number in (1, 2) if stdout else (2,):
        _kept_in[number] = file
        _go_on_in_file(number)


def say(text: str) -> None:
    """A line to standard error from a thread that may hold no lock and wait for nobody; dropped where that is lost."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


class _Stream(io.FileIO):
    """The raw stream below Python's text. needed: a loss is raised as LostOutputError, once."""

    def __init__(self, number: int, *, needed: bool) -> None:
        self._number, self._needed = number, needed
        self._closed = _keep_taken(number)
        super().__init__(number, "wb", closefd=False)

    def write(self, data: Any) -> int:
        if self._number not in _lost:
            try:
                if self._closed is not None:
                    raise self._closed
                return self._write(data)
            except OSError as error:
                self._lose(error, data)
        return len(data)

    def _write(self, data: Any) -> int:
        while True:
            written: int | None = super().write(data)
            if written is not None:
                return written
            select.select([], [self], [])  # another process that shares it has made it not wait

    def _lose(self, error: OSError, data: Any) -> None:
        _lost[self._number] = str(error.strerror)
        _null_at(self._number)
        _go_on_in_file(self._number, bytes(data))
        if self._needed:
            raise LostOutputError(self._number, error)
        if self._number == 1:
            say(f"note: standard output is lost ({error.strerror}); the command continues")


def _go_on_in_file(number: int, data: bytes = b"") -> None:
    if number in _lost and number in _kept_in:
        with contextlib.suppress(OSError), open(_kept_in[number], "ab") as file:
            file.write(f"{_NAMES[number]} is lost ({_lost[number]}); it continues here\n".encode() + data)
            file.flush()
            os.dup2(file.fileno(), number)


def _keep_taken(number: int) -> OSError | None:
    """Why the descriptor cannot be used, None where it can. One that is closed is taken, else the next file would get it."""
    try:
        os.fstat(number)
    except OSError as error:
        _null_at(number)
        return error
    return None


def _null_at(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)


@contextlib.contextmanager
def kept_output(*, needed: bool) -> Iterator[None]:
    """Within the block, standard output and error may be lost.

    needed: standard output is the result; its loss raises LostOutputError at the write or flush that meets it.
    A stand-in for one of them, as in tests, is left alone.
    """
    with contextlib.suppress(OSError):
        _keep_taken(0)
    before = sys.stdout, sys.stderr
    sys.stdout = _kept(1, sys.stdout, sys.__stdout__, needed=needed)
    sys.stderr = _kept(2, sys.stderr, sys.__stderr__, needed=False)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(LostOutputError):
                stream.flush()
        sys.stdout, sys.stderr = before
        _lost.clear()
        _kept_in.clear()


def _kept(number: int, current: TextIO | None, own: TextIO | None, *, needed: bool) -> TextIO:
    if current is not None and current is not own:
        return current
    encoding = own.encoding if own else "utf-8"
    lines = number == 2 or own is None or bool(own.line_buffering)
    stream = io.BufferedWriter(_Stream(number, needed=needed))
    # a name that the encoding lacks is escaped: ASCII, as in a bare container, has no é
    return io.TextIOWrapper(stream, encoding=encoding, errors="backslashreplace", line_buffering=lines)
