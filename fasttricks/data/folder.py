"""Find the images of a data set and say what is wrong with it before training begins. No torch, no DALI.

Layout: ROOT/train/<class>/<image> and ROOT/val/<class>/<image>; classes are numbered by sorted folder name.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from fasttricks.config import UserError

LAYOUT = "the layout is ROOT/train/<class>/<image> and ROOT/val/<class>/<image>"

# What DALI decodes: first bytes -> name. WebP has four bytes of size between RIFF and WEBP; PNM has its own rule below.
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "jp2", "j2k", "jpx", "pnm", "ppm", "pgm", "pbm"]
)
_CLUTTER = frozenset({"thumbs.db", "desktop.ini"})
_HEADER_BYTES = 12
_CHUNK = 2048  # files a task of the header check: large enough that handing out tasks costs nothing
_NAMED = 5  # how many offenders an error names


class DataError(UserError):
    """Input data that breaks a rule. The message names the file or folder, the rule and the way out."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of one split: `files[i]`, relative to `root`, is of class `classes[labels[i]]`."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        """The bytes of image `index`. Raises OSError."""
        descriptor = os.open(f"{self.root}{os.sep}{self.files[index]}", os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            content = os.read(descriptor, size)
            while len(content) < size and (more := os.read(descriptor, size - len(content))):
                content += more
            return content
        finally:
            os.close(descriptor)

    def name(self, index: int) -> str:
        """What to call image `index`: its path, relative to `root`."""
        return self.files[index]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of names and labels."""
        names = hashlib.blake2b(os.fsencode("\0".join(self.files)), digest_size=8)
        names.update(array("q", self.labels).tobytes())
        return names.hexdigest()


def image_format(header: bytes) -> str | None:
    """Name of the image format whose signature the first 12 bytes of a file carry; None if DALI decodes no such."""
    for magic, name in _MAGIC.items():
        if header.startswith(magic):
            return name
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return "WebP"
    if header[:1] == b"P" and header[1:2] in b"123456" and header[2:3].isspace():
        return "PNM"
    return None


def scan_folder(root: Path | str, *, classes: Sequence[str] | None = None) -> ImageFolder:
    """The images in the class folders of `root`, sorted by class and then by name, each checked to be an image.

    Args:
        root: folder with one folder of images a class, such as DATA/train. Class folders are searched one level deep.
        classes: class names that the labels follow, those of train for a val folder, which may lack some but not add
            any.
            None: the sorted names of the folders.

    A file is an image if its extension and its first bytes both say so; the pixels are not decoded. Hidden files,
    Thumbs.db and desktop.ini are skipped, with a warning that counts them.

    Raises DataError for: no such folder, not a folder, empty, no class folders, a class folder without an image, a
    class that is not in `classes`, and a file that is no image.

    Cost: one directory listing a class and one read of 12 bytes a file, in threads.
    """
    root = Path(root)
    folders, loose, skipped = _list_root(root)
    if not folders:
        raise DataError(f"{root}: {_describe(loose)}, but no class folders; {LAYOUT}")
    if loose:
        raise DataError(f"{root}: {_names(loose)} lies beside the class folders; move it into one or away")
    known = tuple(folders) if classes is None else tuple(classes)
    index = {name: label for label, name in enumerate(known)}
    strangers = [name for name in folders if name not in index]
    if strangers:
        raise DataError(
            f"{root}: class folder {_names(strangers)} has no counterpart in train, which has {len(known)} classes; "
            f"add it there or remove it here"
        )
    files: list[str] = []
    labels: list[int] = []
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        # map() keeps the order, so that the result does not depend on which thread ends first
        for name, (found, hidden) in zip(folders, pool.map(lambda name: _list_class(root, name), folders), strict=True):
            if not found:
                raise DataError(f"{root / name}: class folder with no image in it; add images or remove the folder")
            files += found
            labels += [index[name]] * len(found)
            skipped += hidden
        bad = [path for part in pool.map(lambda part: _not_images(root, part), _chunks(files)) for path in part]
    if bad:
        reason = _why_no_image(root / bad[0])
        raise DataError(
            f"{root}: {len(bad)} of {len(files)} files are no images: {_names(bad)} ({reason}); "
            f"remove or convert them (JPEG, PNG, WebP, BMP, TIFF, JPEG 2000 and PNM are read)"
        )
    if skipped:
        warnings.warn(f"{root}: skipped {skipped} hidden or system files (such as .DS_Store, Thumbs.db)", stacklevel=2)
    return ImageFolder(root=root, classes=known, files=tuple(files), labels=tuple(labels))


def scan_dataset(root: Path | str) -> tuple[ImageFolder, ImageFolder]:
    """(train, val) of the data set at `root`, labelled by the classes of train. Raises DataError as scan_folder."""
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such folder; give the folder that holds train/ and val/ as --data.root")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; give the folder that holds train/ and val/ as --data.root")
    missing = [split for split in ("train", "val") if not (root / split).is_dir()]
    if missing:
        there = _names(sorted(os.listdir(root))) or "nothing"
        raise DataError(f"{root}: no folder {' and no folder '.join(missing)} in it (there is {there}); {LAYOUT}")
    train = scan_folder(root / "train")
    return train, scan_folder(root / "val", classes=train.classes)


def _list_root(root: Path) -> tuple[list[str], list[str], int]:
    """(sorted folder names, sorted loose files, number of hidden entries skipped)."""
    if not root.exists():
        raise DataError(f"{root}: no such folder; {LAYOUT}")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; {LAYOUT}")
    folders, loose, skipped = [], [], 0
    with os.scandir(root) as entries:
        for entry in entries:
            if _is_clutter(entry.name):
                skipped += 1
            elif entry.is_dir():
                folders.append(entry.name)
            else:
                loose.append(entry.name)
    if not folders and not loose:
        raise DataError(f"{root}: the folder is empty; {LAYOUT}")
    return sorted(folders), sorted(loose), skipped


def _list_class(root: Path, name: str) -> tuple[list[str], int]:
    """(sorted paths relative to root of everything in a class folder, number of hidden entries skipped)."""
    with os.scandir(root / name) as entries:
        names = [entry.name for entry in entries]
    kept = sorted(n for n in names if not _is_clutter(n))
    return [f"{name}/{n}" for n in kept], len(names) - len(kept)


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _CLUTTER


def _chunks(files: list[str]) -> Iterator[list[str]]:
    source = iter(files)
    while part := list(islice(source, _CHUNK)):
        yield part


def _not_images(root: Path, files: list[str]) -> list[str]:
    base = f"{root}{os.sep}"
    return [path for path in files if not _is_image(base + path)]


def _is_image(path: str) -> bool:
    if path.rpartition(".")[2].lower() not in _EXTENSIONS:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return image_format(os.read(descriptor, _HEADER_BYTES)) is not None
    except OSError:  # a folder with an image's extension
        return False
    finally:
        os.close(descriptor)


def _why_no_image(path: Path) -> str:
    """What _is_image found wrong, in words: asked of one file only."""
    if path.is_dir():
        return "a folder inside a class folder"
    if path.suffix.lower().lstrip(".") not in _EXTENSIONS:
        return f"extension {path.suffix or '(none)'}"
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"first bytes {header!r}" if header else "0 bytes long"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _describe(loose: Sequence[str]) -> str:
    return f"{len(loose)} files lie directly in it ({_names(loose)})"
