"""The files of a tar, as ranges of its bytes, by its headers alone. No torch, no DALI.

Nothing of a tar is unpacked, so a name in it leads nowhere. tarfile takes a cut or a damaged header for the end; here
the end mark alone is.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from fasttricks.data.sources.errors import DataError
from fasttricks.system.reading import read_range, regular_file

_BLOCK = tarfile.BLOCKSIZE
_LONGEST = 1 << 20
"""Bytes of a header, such as a long name, and of the zeros that may follow the end mark."""
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_WHOLE = "copy it again from an intact place"


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    start: int
    length: int


@contextmanager
def opened_tar(path: Path) -> Iterator[tuple[int, Iterator[Member]]]:
    """(descriptor, its files in order) of an uncompressed tar; folders are passed over.

    Raises DataError for a file that cannot be read, is compressed, is no tar, is cut or damaged; and for a member that is a link,
    a device, a pipe or sparse.
    """
    try:
        with regular_file(path) as (descriptor, size):
            first = read_range(descriptor, 0, 6)
            for magic, unpack in _PACKED.items():
                if first.startswith(magic):
                    raise DataError(f"{path}: compressed; unpack it once ({unpack})")
            yield descriptor, _members(path, descriptor, size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {_WHOLE}") from error


def _members(path: Path, descriptor: int, size: int) -> Iterator[Member]:
    with _Headers(descriptor, closefd=False) as file:
        at = -1
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]
                    if member.offset <= at or not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, more than follow")
                    at = member.offset
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        rule = "a link, a device, a pipe or sparse; only whole files are read: write the tar without it"
                        raise DataError(f"{path}: {member.name}: {rule}")
                    yield Member(member.name, member.offset_data, member.size)
                _require_end(descriptor, tar.offset, size)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: no tar, or cut or damaged ({error}); {_WHOLE}") from error


def _require_end(descriptor: int, at: int, size: int) -> None:
    """Raise ReadError unless the end mark, a block of zeros, is there, and nothing but zeros after it."""
    if at + _BLOCK > size:
        raise tarfile.ReadError("its end mark is missing; where it is whole, append 1,024 zero bytes")
    rest = read_range(descriptor, at, min(size - at, _LONGEST))
    if any(rest[:_BLOCK]):
        raise tarfile.ReadError(f"no header at byte {at:,}")
    if any(rest) or size - at > _LONGEST:
        raise tarfile.ReadError(f"more follows its end mark at byte {at:,}, perhaps another tar")


class _Headers(FileIO):
    """The archive for tarfile, which reads whatever length a header claims into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LONGEST:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)
