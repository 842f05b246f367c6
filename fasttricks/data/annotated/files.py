"""The names of images and of the files that belong to them. No torch, no DALI."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fasttricks.data.sources.quarantine import read_quarantine


def quarantined(root: Path, images: str) -> dict[str, str]:
    """The images of the folder ROOT/A/B, `images` is A/B, that a list in it, in ROOT/A or in ROOT has, and why.

    Raises QuarantineError for a list that cannot be read.
    """
    above, _, folder = images.partition("/")
    listed = read_quarantine(root / above, [folder])
    return {name.removeprefix(f"{folder}/"): why for name, why in listed.items() if name.startswith(f"{folder}/")}


def stem(name: str) -> str:
    """The name without its ending; a name that is nothing but an ending as it is."""
    return name.rpartition(".")[0] or name


def by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of each stem, in their order."""
    found = defaultdict(list)
    for name in names:
        found[stem(name)].append(name)
    return dict(found)
