"""Packed images: a few large files, the shards, in place of many small ones, and an index that finds image i in them.

A packed split is a folder with `pack.json` (written last, so that a folder that has one is whole), `index.npz` and
`shard-00000.bin` and so on: encoded images, one after another, in an order drawn at packing. Where an image lies has nothing to
do with when it is read: the index is in the order of the folder that was packed, so a seed gives the order that it gives there.
Written by pack.py. No torch, no DALI.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttricks.data.sources.columns import read_columns
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.listed import LARGEST_IMAGE, ListedImages, Where, digest_of
from fasttricks.data.sources.walk import any_in, why_none
from fasttricks.system.files import write_whole
from fasttricks.system.reading import Reader, is_there, read_range, regular_file
from fasttricks.system.schema import fields, listed, table, text, whole

MANIFEST, INDEX, PLAN = "pack.json", "index.npz", "packing.json"
FORMAT = 1
_COLUMNS = {"shard": np.uint32, "offset": np.uint64, "length": np.uint32, "crc": np.uint32, "label": np.uint32}
REPACK = "copy it again from an intact place, or pack the images again into another folder"
MANIFESTS = Reader(DataError, "damaged, or no pack", REPACK, max_bytes=1 << 28)
_INDEX_BYTES, _IMAGE_BYTES = 1 << 16, 24 + 1024
"""The greatest length of an index: in any case, and an image more."""
PLANS = fields({"images": whole(1, 2**40), "files": text(100)})
BAD = table(text(20_000), key=text(12, r"\d+", "a number"))
_MANIFEST = fields({
    "classes": listed(text()), "shards": table(whole(), key=text(30, r"shard-\d{5,9}\.bin", "named shard-NUMBER.bin")),
    "index_digest": text(100), "altered": text(), "bad": BAD, "troubles": table(text(10_000)), "plan": PLANS,
})  # fmt: skip


@dataclass(frozen=True)
class PackedImages(ListedImages):
    """The images of one packed split, in the order of the folder that was packed.

    `bad`: could not be read or were in the quarantine list when they were packed; 0 bytes here.
    """

    shards: tuple[str, ...]
    """Below `root`, or absolute."""
    index: dict[str, NDArray[Any]]
    """Columns shard, offset, length and crc (zlib's crc32), an entry an image."""
    altered: str = ""
    """How the images differ from those of the folder, such as a short side of 256 pixels; empty: byte for byte the same."""
    _open: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def locate(self, index: int) -> Where:
        """The shard, first byte and length of image `index`."""
        shard, start, length = (int(self.index[column][index]) for column in ("shard", "offset", "length"))
        return Where(os.path.join(self.root, self.shards[shard]), start, length)

    def read(self, index: int) -> bytes:
        """The encoded image `index`. From any thread. Raises OSError, also where its checksum says that it is damaged.

        Shards stay open. The checksum costs 0.27 ms a megabyte.
        """
        shard, start, length, crc = (int(self.index[name][index]) for name in ("shard", "offset", "length", "crc"))
        content = read_range(self._descriptor(shard), start, length)
        if len(content) < length or zlib.crc32(content) != crc:
            place = f"bytes {start} to {start + length} of {self.shards[shard]}"
            raise OSError(errno.EIO, f"{place} fail their checksum: the shard is damaged; {REPACK}")
        return content

    def fingerprint(self) -> str:
        """That of the folder that was packed, where the images are its own byte for byte, so that a run may change over."""
        return digest_of(self.files, self.labels, self.altered)

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._open:
                with regular_file(self.root / self.shards[shard]) as (descriptor, _):
                    self._open[shard] = os.dup(descriptor)
            return self._open[shard]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def is_packed(folder: Path) -> bool:
    """Whether a packed split lies there, or a part of one."""
    return any_in(folder, MANIFEST, PLAN)


def require_finished(root: Path) -> None:
    """Raise DataError where no packed split is at `root`, or one that is not finished. Cost: a look at the folder."""
    if is_there(root / MANIFEST):
        return
    if what := why_none(root):
        raise DataError(f"{root}: {what}; give the folder that `prepare pack` wrote as OUT")
    raise DataError(f"{root}: packing is not finished; give the same `prepare pack` command again, and it continues")


def read_manifest(root: Path) -> dict[str, Any]:
    """The contents of pack.json of the packed split at `root`, its shards as numbers of bytes by name.

    Raises DataError for one that no release wrote, or another.
    """
    file = root / MANIFEST
    manifest: dict[str, Any] = MANIFESTS.json(file, fields({"format": whole()}))
    if manifest["format"] != FORMAT:
        raise DataError(
            f"{root}: packed in format {manifest['format']}, this release reads {FORMAT}; pack the images again"
        )
    try:
        _MANIFEST(manifest, "")
        images, names = manifest["plan"]["images"], list(manifest["shards"])
        if len(set(manifest["classes"])) < len(manifest["classes"]):
            raise ValueError("a class is listed twice")
        if images > sum(manifest["shards"].values()) + len(manifest["bad"]):
            raise ValueError(f"more images, {images:,}, than its shards have bytes")
        if any(int(number) >= images for number in manifest["bad"]):
            raise ValueError(f"a bad image that is none of its {images:,}")
        if names != [shard_name(number) for number in range(len(names))]:
            raise ValueError(f"shards that are not numbered from {shard_name(0)} on")
    except ValueError as error:
        raise MANIFESTS.refusal(file, error) from error
    return manifest


def open_packed(root: Path, *, classes: tuple[str, ...] | None = None) -> PackedImages:
    """The packed split at `root`, its labels in the order of `classes` where given.

    Raises DataError for one that is not finished, of another format, that lacks a file or has one of another size, whose
    index is damaged, or that has a class which `classes` lacks. No file but those of `root` is opened, whatever it says.
    Cost: reads the index, 60 bytes an image, not the images.
    """
    require_finished(root)
    manifest = read_manifest(root)
    shards: dict[str, int] = manifest["shards"]
    for name, size in shards.items():
        if wrong := _why_no_shard(root / name, size):
            raise DataError(f"{root / name}: {wrong}; {REPACK}")
    files, columns = _read_index(root / INDEX, manifest)
    labels, known = columns.pop("label"), tuple(manifest["classes"])
    if classes is not None:
        number = {name: label for label, name in enumerate(classes)}
        strangers = sorted(set(known) - number.keys())
        if strangers:
            raise DataError(
                f"{root}: class {', '.join(strangers[:5])} has no counterpart in train; pack both from one folder"
            )
        labels = np.array([number[name] for name in known], np.uint32)[labels]
        known = classes
    bad = {int(number): why for number, why in manifest["bad"].items()}
    numbered = manifest.get("numbered") is True  # older packs are of sources without numbers
    content = tuple(labels.tolist()), tuple(shards), columns, manifest["altered"]
    return PackedImages(root, known, files, *content, bad=bad, numbered=numbered)


def shard_name(number: int) -> str:
    """The name of shard `number` of a packed split."""
    return f"shard-{number:05d}.bin"


def _why_no_shard(path: Path, size: int) -> str:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    return "" if status.st_size == size else f"has {status.st_size} bytes of {size}"


def write_index(path: Path, files: list[str], columns: dict[str, NDArray[Any]]) -> str:
    """Write the index of a split, whole or not at all. Returns its digest."""
    names = np.frombuffer(os.fsencode("\0".join(files)), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, names=names, **{name: columns[name].astype(kind) for name, kind in _COLUMNS.items()})  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())
    return hashlib.blake2b(buffer.getvalue(), digest_size=16).hexdigest()


def _read_index(path: Path, manifest: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, NDArray[Any]]]:
    """(names, columns), each of as many images as the manifest has, that lie within its shards and are of its classes."""
    images = manifest["plan"]["images"]
    content = MANIFESTS.read(path, _INDEX_BYTES + images * _IMAGE_BYTES)
    if hashlib.blake2b(content, digest_size=16).hexdigest() != manifest["index_digest"]:
        raise DataError(f"{path}: {len(content)} bytes that fail their checksum: the index is cut or damaged; {REPACK}")
    try:
        columns = read_columns(content, {"names": np.uint8, **_COLUMNS})
        names = tuple(os.fsdecode(columns.pop("names").tobytes()).split("\0"))
        for name, found in [("names", len(names)), *((name, len(column)) for name, column in columns.items())]:
            if found != images:
                raise ValueError(f"column {name}: must have the {images} images of {MANIFEST}, but has {found}")
        sizes = np.array([*manifest["shards"].values()], np.uint64)
        _require(columns["label"] < len(manifest["classes"]), names, columns["label"], "label", "of a class")
        _require(columns["shard"] < len(sizes), names, columns["shard"], "shard", "of a shard")
        size = sizes[columns["shard"]]
        _require(columns["offset"] <= size, names, columns["offset"], "offset", "within its shard")
        fits = (columns["length"] <= size - columns["offset"]) & (columns["length"] < LARGEST_IMAGE)
        _require(fits, names, columns["length"], "length", "within its shard, and below 0.5 GB")
    except ValueError as error:
        raise MANIFESTS.refusal(path, error) from error
    return names, columns


def _require(holds: NDArray[np.bool_], names: tuple[str, ...], column: NDArray[Any], name: str, rule: str) -> None:
    wrong = np.flatnonzero(~holds)
    if len(wrong):
        raise ValueError(f"{names[wrong[0]]:.200}: {name} = {column[wrong[0]]}: must be {rule}")
