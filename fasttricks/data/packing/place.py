"""DIR of the commands that prepare data: the fields of a run that say which images it holds. No torch, no DALI."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fasttricks.config import DataConfig, Nested, Range, UserError, check_fields, show_name
from fasttricks.data.packing.pack import PackConfig
from fasttricks.data.sources import Source, find_dataset, holds, open_split


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """Which images of DIR: fields of the section data of a run."""

    labels: str = ""
    """The table of the images, as --data.labels in training."""
    nested: Nested = "error"
    """Folders in a class folder, as --data.nested in training: error, top or leaf."""
    val_share: Annotated[float, Range(0, 1, below=True, zero="off")] = 0.0
    """Share of the images that becomes val, where DIR has no val/, as --data.val-share in training."""

    def place(self, root: Path) -> DataConfig:
        """DIR as the data of a run."""
        given = {name: getattr(self, name) for name in PlaceConfig.__dataclass_fields__}
        return DataConfig(root="./demo" if str(root) == "demo" else str(root), **given)  # a path, not the word

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class SplitConfig(PlaceConfig):
    """How to divide DIR."""

    val_share: Annotated[float, Range(0, 1, above=True, below=True)] = 0.1
    """Share of the images that becomes val, by a hash of their names, as --data.val-share in training."""


@dataclass(frozen=True, kw_only=True)
class PackPlaceConfig(PlaceConfig, PackConfig):
    """How to pack, and the images of DIR."""


def splits_of(place: DataConfig) -> dict[str, Source]:
    """The splits of `place` by name: val too where it has one, or holds images out. Raises DataError as find_dataset."""
    if not place.val_share and not holds(place, "val"):
        return {"train": open_split(place, "train")}
    train, val = find_dataset(place)
    return {"train": train, "val": val}


def require_apart(root: Path, out: Path) -> None:
    """Raise UserError where `out` lies in `root`."""
    inside = Path(os.path.realpath(out))
    if Path(os.path.realpath(root)) in (inside, *inside.parents):
        raise UserError(f"OUT = {show_name(out)}: must not lie in DIR: its folders would gain a class")
