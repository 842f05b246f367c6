"""ImageNet (ILSVRC2012) as its three official archives hold it, without unpacking them.

The training archive is a tar of one tar a class, the validation archive a flat tar; neither is compressed, so that an image is
a range of bytes of a file. Which class a validation image is of stands in the development kit: a number a line, in the order
of the images' names, that meta.mat maps to a WordNet id. Classes are numbered in the order of their sorted WordNet ids.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttricks.data.packing.pack import PackConfig
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.listed import ListedImages, Where
from fasttricks.system.reading import regular_file

_CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
_VAL_IMAGE = re.compile(r"(?:.*/)?(ILSVRC2012_val_\d{8}\.JPEG)")
_LARGEST = 1 << 26  # bytes of a file of the kit, whose two are below 1 MB
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True, kw_only=True)
class ImagenetConfig(PackConfig):
    """Which archives to pack, and how."""

    train_tar: str = ""
    """ILSVRC2012_img_train.tar, 138 GB."""
    val_tar: str = ""
    """ILSVRC2012_img_val.tar, 6.3 GB."""
    devkit_tar: str = ""
    """ILSVRC2012_devkit_t12.tar.gz, 2.5 MB."""


@dataclass(frozen=True)
class ArchiveImages(ListedImages):
    """Images inside the archive `root`, named and ordered as in the folder that it would be unpacked to."""

    places: tuple[tuple[int, int], ...]
    """(first byte, number of bytes) of each image."""

    def locate(self, index: int) -> Where:
        """The bytes of the archive that are image `index`."""
        return Where(str(self.root), *self.places[index])


def open_imagenet(train_tar: Path, val_tar: Path, devkit_tar: Path) -> tuple[ArchiveImages, ArchiveImages]:
    """(train, val) of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz.

    Raises DataError for an archive that is missing, cut or of another structure, and where the three do not fit together: a
    class that the kit does not know, a class without images, another number of validation images than labels. Cost: a read
    of 512 bytes an image.
    """
    synsets, truth = _read_devkit(devkit_tar)
    classes = tuple(sorted(synsets.values()))
    train = _read_train(train_tar, classes)
    val = sorted(_members(val_tar, _VAL_IMAGE, "ILSVRC2012_val_00000001.JPEG"))
    if len(val) != len(truth):
        raise DataError(
            f"{val_tar}: {len(val)} images, but {devkit_tar} has labels for {len(truth)}; take the matching archives"
        )
    unknown = sorted(set(truth) - set(synsets))
    if unknown:
        raise DataError(f"{devkit_tar}: {_TRUTH} has class number {unknown[0]}, which {_META} does not know")
    named = [(f"{synsets[number]}/{name}", place) for number, (name, place) in zip(truth, val, strict=True)]
    return _images(train_tar, classes, train), _images(val_tar, classes, named)


def _images(root: Path, classes: tuple[str, ...], named: list[tuple[str, tuple[int, int]]]) -> ArchiveImages:
    named = sorted(named)
    number = {name: label for label, name in enumerate(classes)}
    labels = tuple(number[name.partition("/")[0]] for name, _ in named)
    return ArchiveImages(root, classes, tuple(name for name, _ in named), labels, tuple(place for _, place in named))


def _read_train(path: Path, classes: tuple[str, ...]) -> list[tuple[str, tuple[int, int]]]:
    named = []
    wanted = set(classes)
    found = set()
    for name, (start, length) in _members(path, _CLASS_TAR, "n01440764.tar"):
        synset = name.removesuffix(".tar")
        if synset not in wanted:
            known = f"the {len(classes)} classes of the development kit"
            raise DataError(f"{path}: class {synset} is not among {known}; take the matching archives")
        found.add(synset)
        inner = re.compile(rf"(?:.*/)?({synset}_\d+\.JPEG)")
        images = list(_members(path, inner, f"{synset}_10026.JPEG", start, length))
        if not images:
            raise DataError(f"{path}: {name} holds no image")
        named += [(f"{synset}/{image}", place) for image, place in images]
    missing = sorted(wanted - found)
    if missing:
        some = f"{len(missing)} of {len(classes)} classes are missing, such as {missing[0]}"
        raise DataError(f"{path}: {some}; take the whole archive")
    return named


def _members(
    path: Path, pattern: re.Pattern[str], example: str, start: int = 0, length: int | None = None
) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (first byte, number of bytes)) of the files of an uncompressed tar, itself `length` bytes from `start` of `path`."""
    try:
        with regular_file(path) as (descriptor, whole), open(descriptor, "rb", closefd=False) as file:
            window: Any = file if length is None else _Window(file, start, length)
            end = whole if length is None else start + length
            with tarfile.open(fileobj=window, mode="r:") as tar:
                for member in tar:
                    if member.isdir():
                        continue
                    matched = pattern.fullmatch(member.name)
                    if not member.isfile() or matched is None:
                        raise DataError(
                            f"{path}: unknown structure: it holds {member.name}, where a name like {example} belongs"
                        )
                    at = start + member.offset_data
                    if at + member.size > end:
                        raise DataError(f"{path}: cut off in {member.name}: the archive is not whole; copy it again")
                    yield matched[1], (at, member.size)
    except tarfile.TarError as error:
        inside = f" (the tar at byte {start})" if length is not None else ""
        raise DataError(
            f"{path}{inside}: no uncompressed tar, or cut off ({error}); take the original archive"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the archive") from error


class _Window(io.RawIOBase):
    """`length` bytes of a file from `start` on, as a file of their own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        content = self._file.read(left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def _read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """({class number: WordNet id}, the class number of each validation image)."""
    found: dict[str, bytes] = {}
    try:
        with (
            regular_file(path) as (descriptor, _),
            open(descriptor, "rb", closefd=False) as archive,
            tarfile.open(fileobj=archive) as tar,
        ):
            for member in tar:
                for wanted in (_META, _TRUTH):
                    if member.name.endswith(wanted) and (file := tar.extractfile(member)):
                        if member.size > _LARGEST:
                            raise DataError(
                                f"{path}: {wanted} of {member.size:,} bytes; give ILSVRC2012_devkit_t12.tar.gz"
                            )
                        found[wanted] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read as an archive ({error}); give ILSVRC2012_devkit_t12.tar.gz") from error
    missing = [name for name in (_META, _TRUTH) if name not in found]
    if missing:
        raise DataError(f"{path}: no {missing[0]} in it; give ILSVRC2012_devkit_t12.tar.gz")
    try:
        truth = [int(line) for line in found[_TRUTH].split()]
    except ValueError as error:
        raise DataError(f"{path}: {_TRUTH} must have a number a line ({error})") from error
    return _read_synsets(path, found[_META]), truth


def _read_synsets(path: Path, content: bytes) -> dict[int, str]:
    """{class number: WordNet id} of the classes that have images; meta.mat also lists the groups above them."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        command = "pip install 'fasttricks[imagenet]' (in a checkout: pip install '.[imagenet]')"
        raise DataError(f"{path}: reading {_META} needs scipy; install it with: {command}") from error
    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        return {int(number): str(wnid) for number, wnid, children in rows if int(children) == 0}
    except Exception as error:  # scipy raises many kinds of error at a damaged file
        raise DataError(f"{path}: {_META} is damaged or of another kind ({error!r})") from error
