"""Work on many files in threads, with a progress bar: the first bytes of images, the indices of shards. No torch, no DALI."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from fasttricks.config import show_name
from fasttricks.data.sources.errors import why_unreadable
from fasttricks.data.sources.headers import HEADER_BYTES, why_no_image
from fasttricks.system.progress import counted

_CHUNK = 2048  # files a task of the header check: large enough that handing out tasks costs nothing
_PATIENCE_S = 2.0  # before a progress bar is shown
S = TypeVar("S")
T = TypeVar("T")


def in_threads(text: str, items: Sequence[S], work: Callable[[S], T]) -> list[T]:
    """work(item) of each, in their order, in threads, with a bar. The first error, in their order, ends it."""
    with threads() as pool:
        try:
            return list(with_bar(text, len(items), ((1, one) for one in pool.map(work, items))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def find_bad(root: Path, files: Iterable[str], total: int) -> dict[str, str]:
    """Those of `files`, `total` paths relative to `root`, that are no images by their first bytes, and why.

    Cost: one read of 12 bytes a file, in threads, with a progress bar after 2 s.
    """
    with threads() as pool:
        # map() keeps the order, so that the result does not depend on which thread ends first
        checked = pool.map(lambda part: (len(part), _reasons(root, part)), _chunks(files))
        return {file: why for part in with_bar(f"check {root.name}", total, checked) for file, why in part.items()}


def threads() -> ThreadPoolExecutor:
    """As many as disks and networks answer at once."""
    return ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1)))


def with_bar(text: str, total: int, parts: Iterable[tuple[int, T]]) -> Iterator[T]:
    """The values that come with each count of `parts`, under a bar that counts up to `total` once that takes long."""
    with counted(show_name(text), total, after=_PATIENCE_S) as advance:
        for count, part in parts:
            advance(count)
            yield part


def _chunks(files: Iterable[str]) -> Iterator[list[str]]:
    source = iter(files)
    while part := list(islice(source, _CHUNK)):
        yield part


def _reasons(root: Path, files: list[str]) -> dict[str, str]:
    """Those of `files` that are no images, and why."""
    base = f"{root}{os.sep}"
    found = ((file, why_bad(base + file)) for file in files)
    return {file: why for file, why in found if why is not None}


def why_bad(path: str) -> str | None:
    """The fault of the file by its first bytes; None for an image. Never waits for a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return why_unreadable(error)
    try:
        return why_no_image(os.read(descriptor, HEADER_BYTES))
    except OSError as error:  # a folder with an image's extension
        return why_unreadable(error)
    finally:
        os.close(descriptor)
