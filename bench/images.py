"""Folders of images for a measurement, made of links or of small copies."""

from __future__ import annotations

from pathlib import Path

from fasttricks.data.sources.folder import scan_folder


def link_images(source: Path, target: Path, count: int) -> Path:
    """A folder of class folders of links to `count` images of `source`, evenly spread over it (all where it has fewer)."""
    for name in _spread(source, count):
        link = target / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((source / name).resolve())
    return target


def shrink_images(source: Path, target: Path, count: int, side: int) -> Path:
    """The same of copies, side x side pixels, as JPEGs of quality 95."""
    from PIL import Image

    for name in _spread(source, count):
        copy = (target / name).with_suffix(".jpg")
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source / name) as image:
            image.convert("RGB").resize((side, side)).save(copy, quality=95)
    return target


def _spread(source: Path, count: int) -> list[str]:
    folder = scan_folder(source)
    chosen = sorted({len(folder) * i // count for i in range(count)}) if count < len(folder) else range(len(folder))
    return [folder.files[index] for index in chosen]
