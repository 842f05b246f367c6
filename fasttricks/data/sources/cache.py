"""The user's cache: an index of a data set, or a copy of its images, made once. It may be removed at any time.

Each is written whole or not at all, by one process, while the others wait for it. No torch, no DALI.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fasttricks.config import show_name
from fasttricks.data.sources.columns import read_columns
from fasttricks.data.sources.errors import DataError
from fasttricks.system.files import temporary_of, write_whole
from fasttricks.system.ownership import Claim, Owner
from fasttricks.system.reading import Reader, is_there

OTHER_CACHE = "set XDG_CACHE_HOME to a folder that can be written"
_DIGEST_BYTES = 16
_KEPT = Reader(DataError, "damaged", "it is made again", max_bytes=1 << 36)
Columns = Mapping[str, NDArray[Any]]


def cache_folder() -> Path:
    """fasttricks in $XDG_CACHE_HOME or ~/.cache. Raises OSError where this user has no home."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if os.path.isabs(xdg):
        return Path(xdg, "fasttricks")
    try:
        return Path.home() / ".cache" / "fasttricks"
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        way_out = "set XDG_CACHE_HOME to a folder that this user can write"
        raise OSError(f"this user has no home folder for a cache; {way_out}") from error


def name_of(kind: str, root: Path, files: Sequence[str], *more: object) -> str:
    """The name of an index or a copy of these files of `root`: another once one of them changes its size or its time.

    more: whatever else decides it. Raises OSError where a file cannot be looked at.
    """
    statuses = [(name, os.stat(root / name)) for name in files]
    parts = [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]
    digest = hashlib.blake2b(
        repr((os.path.realpath(root), parts, more)).encode("utf-8", "surrogatepass"), digest_size=8
    )
    return f"{kind}-{digest.hexdigest()}"


def cached(name: str, made_of: Path) -> Path:
    """The path of that name in the cache. Raises DataError where this user has no cache. made_of: for the message."""
    try:
        return cache_folder() / name
    except OSError as error:
        raise _no_cache(made_of, error) from error


@contextmanager
def kept_place(name: str, made_of: Path) -> Iterator[Path]:
    """The same, which no other process makes during the block; the folder of the cache is there. Raises DataError."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)

        def say(owner: Owner) -> None:
            from rich.console import Console

            text = f"Waiting for the index of {show_name(made_of)}, which {owner} makes"
            Console(stderr=True).print(text, soft_wrap=True, markup=False, highlight=False)

        claim = Claim(folder / f".{name}.lock", patience_s=math.inf, waiting=say)
    except OSError as error:
        raise _no_cache(made_of, error) from error
    with claim:
        yield folder / name


def kept_columns(
    name: str, made_of: Path, kinds: Mapping[str, DTypeLike], make: Callable[[], Columns]
) -> dict[str, NDArray[Any]]:
    """The columns of that name in the cache, made by make() where it lacks them, or they are damaged.

    Raises DataError as kept_place.
    """
    path = cached(f"{name}.npz", made_of)
    if (found := _read(path, kinds)) is not None:
        return found
    with kept_place(path.name, made_of):
        if (found := _read(path, kinds)) is not None:  # another process has made it while this one waited
            return found
        columns = make()
        buffer = io.BytesIO()
        np.savez(buffer, **{name: columns[name].astype(kind) for name, kind in kinds.items()})  # type: ignore[arg-type]
        content = buffer.getvalue()
        try:
            write_whole(path, content + _digest(content), temporary_of(path))
        except OSError as error:
            raise _no_cache(made_of, error) from error
    return read_columns(content, kinds)


def _read(path: Path, kinds: Mapping[str, DTypeLike]) -> dict[str, NDArray[Any]] | None:
    """None where it is not there; a damaged one is named."""
    if not is_there(path):
        return None
    try:
        content = _KEPT.read(path)
        if _digest(content[:-_DIGEST_BYTES]) != content[-_DIGEST_BYTES:]:
            raise _KEPT.refusal(path, "its checksum fails")
        return read_columns(content[:-_DIGEST_BYTES], kinds)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def _no_cache(made_of: Path, error: OSError) -> DataError:
    return DataError(f"{made_of}: its index cannot be written to the cache ({error}); free some room, or {OTHER_CACHE}")
