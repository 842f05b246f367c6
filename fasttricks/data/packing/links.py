"""Write a split down: train/ and val/ of symbolic links to the images of a place that is not divided. No torch, no DALI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from fasttricks.config import show_name
from fasttricks.data.sources import Source
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.quarantine import QUARANTINED, write_quarantine


def write_links(splits: Mapping[str, Source], out: Path, advance: Callable[[int], object] = lambda count: None) -> None:
    """OUT/SPLIT/CLASS/IMAGE for each image of each split, a relative link to its file; whole, or not at all.

    Bad images are linked too, so every image keeps its number; those of a quarantine list are in OUT/quarantine.jsonl.
    advance: is called with each number of new links. Raises DataError where `out` holds something, where another call makes it or
    was killed, for images that are no files of their own, a name that would leave its folder, and a disk that takes no links.
    """
    try:
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{show_name(out)}: holds something; give a new folder or an empty one")
        partial = out.parent / f".{out.name}.partial"
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.mkdir()
        except FileExistsError:
            rule = "another split makes it, or was killed; remove it if none runs, and give the same command again"
            raise DataError(f"{show_name(partial)}: {rule}") from None
        try:
            _write(splits, partial, out, advance)
            os.replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        place = show_name(error.filename or out)
        raise DataError(f"{place}: the links cannot be written ({error.strerror}); give another OUT") from error


def _write(splits: Mapping[str, Source], partial: Path, out: Path, advance: Callable[[int], object]) -> None:
    real = cache(os.path.realpath)
    # links are relative to their final place, which is not there yet
    home = os.path.join(real(out.parent), out.name)
    listed: dict[str, str] = {}
    for split, source in splits.items():
        made: set[str] = set()
        for index in range(len(source)):
            name, where = source.name(index), source.locate(index)
            folder, _, file = name.rpartition("/")
            if where.length >= 0:
                rule = "is a part of a file, to which no link leads; write the split down by `fasttricks data pack DIR OUT`"
                raise DataError(f"{show_name(name)} of {show_name(source.root)}: {rule}")
            if not folder or {"", ".", ".."} & set(name.split("/")):
                raise DataError(
                    f"{show_name(name)} of {show_name(source.root)}: must be CLASS/IMAGE below OUT; rename it"
                )
            if not name.startswith(f"{(own := source.classes[source.labels[index]])}/"):
                rule = f"must lie in the folder of its class, {show_name(own)}, as links keep no other label"
                raise DataError(
                    f"{show_name(name)} of {show_name(source.root)}: {rule}; `fasttricks data pack DIR OUT` does"
                )
            if folder not in made:
                (partial / split / folder).mkdir(parents=True, exist_ok=True)
                made.add(folder)
            above, _, last = where.path.rpartition(os.sep)
            # the folder's links are followed, for .. would not lead back over them; the image's own is kept
            target = os.path.join(real(above or os.sep if os.path.isabs(where.path) else above or "."), last)
            os.symlink(os.path.relpath(target, os.path.join(home, split, folder)), partial / split / folder / file)
            if (why := source.bad.get(index, "")).startswith(QUARANTINED):
                listed[f"{split}/{name}"] = why.removeprefix(QUARANTINED)
            advance(1)
    write_quarantine(partial, listed)
